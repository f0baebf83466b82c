"""Prompts: text files with placeholders for what is known about a row, and corrections of replies."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import ConfigError
from longclip.text.sentences import caption_text
from pipelines.common.storage import local_path
from pipelines.data.captions.checks import Problem
from pipelines.data.captions.settings import CaptionSettings, Checks

WORDS_PER_TOKEN = (0.85, 0.75)
"""English words per CLIP token, from above and from below: what is asked for is well within what is accepted."""

FIXED = ("min_words", "max_words", "language")
_PLACEHOLDER = re.compile(r"\{([^{}\n]*)\}")


class Prompt:
    """A prompt file, filled in for one row after another."""

    def __init__(self, text: str, columns: Collection[str], checks: Checks) -> None:
        """
        Args:
            text: content of the file.
            columns: columns of the rows that may be named in it.
            checks: length and language to ask for.

        Raises:
            ConfigError: it is empty, or has an unknown placeholder.
        """
        self.lines = text.strip().splitlines()
        self.fixed: dict[str, Any] = dict(zip(FIXED, (*words_asked(checks), checks.language), strict=True))
        self.digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        if not self.lines:
            raise ConfigError("prompt: the file is empty; write what the model shall do with the image")
        names = [name for line in self.lines for name in _PLACEHOLDER.findall(line)]
        unknown = [name for name in names if name not in (*FIXED, *columns)]
        if unknown:
            allowed = ", ".join(f"{{{name}}}" for name in (*FIXED, *columns))
            raise ConfigError(
                f"prompt: placeholder {{{unknown[0]}}} is unknown; allowed are {allowed}; name further columns with"
                " source.keep"
            )
        self.columns = [name for name in dict.fromkeys(names) if name in columns]

    def filled(self, row: Mapping[str, Any]) -> str:
        """The prompt for a row: values of columns are texts, lists of texts, numbers or None. A line whose column is
        empty is left out. Braces in values are kept."""
        values = self.fixed | {name: value_text(row.get(name)) for name in self.columns}
        return "\n".join(
            _PLACEHOLDER.sub(lambda match: str(values[match[1]]), line)
            for line in self.lines
            if all(values[name] != "" for name in _PLACEHOLDER.findall(line))
        )

    def lacks(self, row: Mapping[str, Any]) -> bool:
        """Whether a line is left out for this row."""
        return any(value_text(row.get(name)) == "" for name in self.columns)


def load_prompt(settings: CaptionSettings) -> Prompt:
    """The prompt that the settings name.

    Raises:
        ConfigError: the file does not exist, or cannot be used.
    """
    packaged = resources.files("pipelines.data.captions") / "prompts"
    names = sorted(file.name.removesuffix(".txt") for file in packaged.iterdir())
    if settings.prompt in names:
        text = (packaged / f"{settings.prompt}.txt").read_text("utf-8")
    else:
        path: Path = local_path("prompt", settings.prompt)
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ConfigError(
                f"prompt='{settings.prompt}' cannot be read: {reason}; give a text file, or one of {', '.join(names)}"
            ) from error
    return Prompt(text, ("caption", *settings.source.keep), settings.checks)


def value_text(value: Any) -> str:
    """What a cell says in a prompt, as one line; "" for None and blank texts."""
    if isinstance(value, str) or value is None:
        text = value or ""
    elif isinstance(value, Sequence) and all(isinstance(part, str | None) for part in value):
        text = caption_text(value)
    else:
        text = str(value)
    # Half of a surrogate pair cannot be sent.
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def words_asked(checks: Checks) -> tuple[int, int]:
    """Least and greatest number of words to ask for."""
    bounds = sorted((round(checks.min_tokens * WORDS_PER_TOKEN[0]), round(checks.max_tokens * WORDS_PER_TOKEN[1])))
    return bounds[0], bounds[1]


def correction(problem: Problem, tokens: int, checks: Checks) -> str:
    """What the model is told about a reply that cannot be used."""
    least, greatest = words_asked(checks)
    again = f"Describe the image again in one paragraph of {least} to {greatest} words, in {checks.language}"
    reasons = {
        "empty": "Your answer had no text",
        "not_text": "Your answer had characters that are not text",
        "refusal": "That does not describe the image. Whatever can be seen in it is enough",
        "markup": "That has a list, headings or other markup. Write plain, full sentences only",
        "repetition": "That repeats itself. Say each thing once",
        "language": f"That is not {checks.language}",
        "cut_off": "That is too long and was cut off",
        "too_long": f"That is too long: {tokens} tokens, where {LONG_CLIP_CONTEXT_LENGTH} can be read",
        "too_short": f"That is too short: {tokens} tokens, where at least {checks.min_tokens} are needed",
    }
    return f"{reasons[problem]}. {again}. Answer with the paragraph alone."
