"""The way from an image to its caption: what to ask next, given the replies so far.

    step = next_step(replies, checks)
    while isinstance(step, Ask): ask the model, journal its reply, and look again

It depends on nothing but the replies. So a job that was killed continues from the journal of its replies, and every
strategy that can answer a conversation works in the same way.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from longclip.errors import DataError
from pipelines.common.chat_endpoint import Completion, Messages
from pipelines.data.captions.checks import Problem, Verdict, judge
from pipelines.data.captions.prompting import Prompt, correction
from pipelines.data.captions.settings import Checks, ImageSettings
from pipelines.data.sources.source import SourceRow
from pipelines.data.usable_images import usable_image

MAX_ECHO = 2000
"""Characters of a rejected reply that the model is shown again."""


@dataclass(frozen=True)
class Ask:
    """The model has to be asked."""

    rejected: Completion | None = None
    """The last reply; None for the first request."""
    problem: str = ""
    """What the model is told about it."""


@dataclass(frozen=True)
class Accepted:
    """The row has a caption."""

    verdict: Verdict
    attempts: int
    """Replies that it took."""


@dataclass(frozen=True)
class Failed:
    """The row gets no caption."""

    reason: str


Step = Ask | Accepted | Failed


def next_step(replies: Sequence[Completion], checks: Checks) -> Step:
    """What to do for a row with these replies."""
    problems: list[Problem] = []
    verdict = None
    for number, reply in enumerate(replies, 1):
        verdict = judge(reply.text, reply.finish_reason, checks, last=False)
        if verdict.problem is None:
            return Accepted(verdict, number)
        problems.append(verdict.problem)
    if verdict is None:
        return Ask()
    if len(replies) < checks.attempts:
        assert verdict.problem is not None
        return Ask(replies[-1], correction(verdict.problem, verdict.tokens, checks))
    for reply in reversed(replies):  # a caption that is only too long can be cut
        verdict = judge(reply.text, reply.finish_reason, checks, last=True)
        if verdict.problem is None:
            return Accepted(verdict, len(replies))
    named = ", ".join(dict.fromkeys(problems))
    return Failed(f"no reply can be used as a caption: {named}")


@dataclass
class Draft:
    """A row that is being captioned."""

    row: int
    """Its number in the piece."""
    image: bytes
    """What the model is shown, as JPEG."""
    prompt: str
    step: Step
    replies: list[Completion] = field(default_factory=list)

    def conversation(self) -> list[tuple[str, str]]:
        """(role, text) of each message, without the image, which is in the first one."""
        assert isinstance(self.step, Ask)
        if self.step.rejected is None:
            return [("user", self.prompt)]
        if not self.step.rejected.text.strip():  # not every server takes an empty message
            return [("user", f"{self.prompt}\n{self.step.problem}")]
        echo = self.step.rejected.text.encode("utf-8", "replace").decode()[:MAX_ECHO]
        return [("user", self.prompt), ("assistant", echo), ("user", self.step.problem)]

    def messages(self) -> Messages:
        """The conversation as chat completions take it, with the image as a data URI."""
        (role, text), *others = self.conversation()
        image = {"type": "image_url", "image_url": {"url": data_uri(self.image)}}
        content: list[Any] = [image, {"type": "text", "text": text}]
        return [{"role": role, "content": content}, *({"role": role, "content": text} for role, text in others)]

    def add(self, reply: Completion, checks: Checks) -> None:
        """Take a reply into account."""
        self.replies.append(reply)
        self.step = next_step(self.replies, checks)


def draft_of(
    number: int, row: SourceRow, replies: list[Completion], prompt: Prompt, image: ImageSettings, checks: Checks
) -> Draft:
    """The draft of a row with the replies that it has so far.

    Raises:
        DataError: the image cannot be decoded, or is too large or too small, or nothing of the prompt is left.
    """
    text = prompt.filled(prompt_values(row))
    if not text:
        raise DataError(f"the columns of the prompt ({', '.join(prompt.columns)}) are empty")
    return Draft(number, shown_image(row.image, image), text, next_step(replies, checks), replies)


def prompt_values(row: SourceRow) -> dict[str, Any]:
    """What a prompt may say of a row."""
    return {**row.extra, "caption": row.captions}


def data_uri(image: bytes) -> str:
    """A JPEG as a URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def shown_image(data: bytes, settings: ImageSettings) -> bytes:
    """An image as the model is shown it: upright, RGB, with a longest side of at most `max_side`, as JPEG.

    Raises:
        ImageError: it cannot be decoded, or is too large or too small.
    """
    image = usable_image(data, settings)
    image.thumbnail((settings.max_side, settings.max_side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=settings.jpeg_quality)
    return out.getvalue()
