"""Limits and meters of requests: tokens of the whole job, and requests in flight."""

import threading
import time
from collections.abc import Iterable
from typing import Any

from longclip.errors import LongClipError
from pipelines.common.chat_endpoint import Completion


class BudgetError(LongClipError):
    """The job stopped because it used as many tokens as it may."""

    exit_code = 8


class Budget:
    """Tokens that all processes of a job have used, an actor."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def spend(self, tokens: int) -> bool:
        """Count tokens; whether the limit is reached."""
        self.used += tokens
        return self.used >= self.limit


def usage(replies: Iterable[Completion]) -> dict[str, int]:
    """Numbers of replies and their tokens, and of replies for which the server gave none."""
    counts = {"replies": 0, "prompt_tokens": 0, "completion_tokens": 0, "without_usage": 0}
    for reply in replies:
        counts["replies"] += 1
        counts["prompt_tokens"] += reply.prompt_tokens or 0
        counts["completion_tokens"] += reply.completion_tokens or 0
        counts["without_usage"] += reply.prompt_tokens is None or reply.completion_tokens is None
    return counts


def total_tokens(replies: Iterable[Completion]) -> int:
    """Tokens of replies and their prompts."""
    counts = usage(replies)
    return counts["prompt_tokens"] + counts["completion_tokens"]


class FlightMeter:
    """Measures how many of the allowed requests are in flight while there is something to ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = self._waiting = 0
        self._last = time.monotonic()
        self._waiting_seconds = self._flight_seconds = 0.0

    def change(self, in_flight: int = 0, waiting: int = 0) -> None:
        """A request starts (+1) or ends (-1); something to ask appears or is taken."""
        with self._lock:
            now = time.monotonic()
            if self._waiting:
                self._waiting_seconds += now - self._last
                self._flight_seconds += self._in_flight * (now - self._last)
            self._last = now
            self._in_flight += in_flight
            self._waiting += waiting

    def take(self) -> dict[str, Any]:
        """Seconds in which something waited, and the sum of the requests' seconds in flight within them, since the last
        call."""
        self.change()
        with self._lock:
            measured = {"waiting_seconds": self._waiting_seconds, "flight_seconds": self._flight_seconds}
            self._waiting_seconds = self._flight_seconds = 0.0
            return measured
