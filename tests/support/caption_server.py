"""A chat completions server that describes images, with faults of models and of servers."""

import base64
import hashlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.chat_server import ChatServer, running

SIZES = ("small", "large", "tall", "narrow", "round", "heavy", "thin", "broad")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "purple")
THINGS = ("dog", "bicycle", "table", "tree", "car", "child", "boat", "wall", "chair", "lamp", "basket", "horse")
VERBS = ("stands", "rests", "leans", "waits", "is seen", "appears", "has been left", "sits")
PLACES = ("on the left", "at the right edge", "in front", "near its middle", "behind them", "far away", "under a roof")
DETAILS = ("casting soft shadows", "worn at both ends", "lit from above", "half hidden", "covered with dust", "wet")
GERMAN = (
    "Auf dem Bild ist ein Hund zu sehen, der auf einer Wiese steht. Im Hintergrund sind Bäume und ein Haus mit einem"
    " roten Dach. Der Himmel ist blau, und die Sonne scheint von der Seite auf das Fell des Hundes."
)


def description(seed: Any, sentences: int = 13) -> str:
    """A paragraph of about 14 tokens for each of its sentences."""
    draw = random.Random(str(seed))
    text = []
    for _ in range(sentences):
        size, colour, thing = draw.choice(SIZES), draw.choice(COLOURS), draw.choice(THINGS)
        text.append(f"A {size} {colour} {thing} {draw.choice(VERBS)} {draw.choice(PLACES)}, {draw.choice(DETAILS)}.")
    return " ".join(text)


FAULTS = {
    "refused": lambda seed: "I'm sorry, but I can't help with describing this image.",
    "looped": lambda seed: "A dog runs on the grass. " * 40,
    "german": lambda seed: GERMAN,
    "listed": lambda seed: "\n".join(f"- {line}." for line in description(seed).split(". ")),
    "short": lambda seed: "A dog on the grass.",
    "endless": lambda seed: description(seed, 24),
    "empty": lambda seed: "",
    "garbled": lambda seed: description(seed) + " \ud83d",
    "introduced": lambda seed: f"Sure! Here is a detailed description of the image:\n\n{description(seed)}",
}
"""Word in the prompt -> reply of a model that does this."""


class CaptionServer(ChatServer):
    """Describes images. Words in the prompt select faults: those of `FAULTS`, always or, with `once` in front, until
    the model is told about it; and of the server: `busy`, `limited` (429), `nonsense` (not JSON), `rejected` (400),
    `unfinished` (cut off), `filtered`."""

    def __init__(self, port: int = 0, seconds: float = 0.0) -> None:
        super().__init__(port)
        self.retry_after = "0"
        self.seconds = seconds
        """Time that a reply takes."""
        self.images: Counter[str] = Counter()
        """Requests for each image, by its hash."""
        self.usage = True
        """Whether replies have the numbers of tokens."""

    def reply(self, body: dict[str, Any], attempts_before: int) -> tuple[int, Any, int]:
        """See `ChatServer.reply`."""
        image, text = body["messages"][0]["content"]
        digest = hashlib.sha256(base64.b64decode(image["image_url"]["url"].partition(",")[2])).hexdigest()
        with self.lock:
            self.images[digest] += 1
        if self.seconds:
            time.sleep(self.seconds)
        prompt, corrected = text["text"], len(body["messages"]) > 1 or "Your answer had no text" in text["text"]
        wrong = next((make for word, make in FAULTS.items() if re.search(rf"\b{word}\b", prompt)), None)
        content = wrong(digest) if wrong and not ("once" in prompt and corrected) else description(digest)
        choice: dict[str, Any] = {"message": {"content": content}, "finish_reason": "stop"}
        if "unfinished" in prompt:
            choice |= {"message": {"content": description(digest, 24)[:-20]}, "finish_reason": "length"}
        if "filtered" in prompt:
            choice |= {"message": {"content": ""}, "finish_reason": "content_filter"}
        reply: Any = {"choices": [choice]}
        if self.usage:
            reply["usage"] = {"prompt_tokens": 100, "completion_tokens": len(content.split())}
        if "nonsense" in prompt:
            reply = "not a completion"
        early = attempts_before < 2
        faults = {"busy": 503 if early else 200, "limited": 429 if early else 200, "rejected": 400}
        status = next((code for word, code in faults.items() if word in prompt), self.status)
        return status, reply, 0


class Flight:
    """Samples how many requests a server holds, from the first one until fewer are left than it may hold at a time."""

    def __init__(self, server: ChatServer, requests: int, concurrency: int) -> None:
        self.server, self.last, self.samples = server, requests - concurrency, list[int]()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while len(self.server.requests) < self.last:
            if self.server.requests:
                self.samples.append(self.server.active)
            time.sleep(0.002)


@pytest.fixture
def caption_server(no_keys: None) -> Iterator[CaptionServer]:
    """A server on this machine."""
    with running(CaptionServer()) as server:
        yield server
