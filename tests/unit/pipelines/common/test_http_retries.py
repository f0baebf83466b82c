"""Retries of HTTP requests: what is retried, how long the pauses are, and what is given up."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from pipelines.common import http_retries
from pipelines.common.http_retries import MAX_PAUSE_SECONDS, send_with_retries


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited before retries."""
    seconds: list[float] = []
    monkeypatch.setattr(http_retries.time, "sleep", seconds.append)
    return seconds


def send(outcomes: Iterable[Any], attempts: int, max_bytes: int = 100) -> tuple[int, bytes]:
    """Status and body; each attempt takes the next outcome, a response or an exception to raise."""
    remaining = iter(outcomes)

    def respond(request: httpx.Request) -> httpx.Response:
        outcome = next(remaining)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with httpx.Client(transport=httpx.MockTransport(respond)) as client:
        request = client.build_request("POST", "http://server/", json={})
        response, body = send_with_retries(client, request, attempts, max_bytes)
    return response.status_code, body


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_busy_and_failing_servers_are_retried(pauses: list[float], status: int) -> None:
    outcomes = [httpx.Response(status), httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(200)]
    assert send(outcomes, attempts=4) == (200, b"")
    assert len(pauses) == 3
    assert all(2**retry / 2 <= pause <= 2**retry for retry, pause in enumerate(pauses)), "jitter takes up to half"


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_rejected_requests_are_not_retried(pauses: list[float], status: int) -> None:
    assert send([httpx.Response(status, text="why")], attempts=3) == (status, b"why")
    assert not pauses


def test_last_attempt_returns_or_raises_its_outcome(pauses: list[float]) -> None:
    assert send([httpx.ConnectError("x"), httpx.Response(503, text="busy")], attempts=2) == (503, b"busy")
    with pytest.raises(httpx.ConnectError, match="second"):
        send([httpx.ConnectError("first"), httpx.ConnectError("second")], attempts=2)
    assert len(pauses) == 2


def test_retry_after_is_a_minimum_and_pauses_have_a_maximum(pauses: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    for header in ("20", date, "soon", "Wed, 21 Oct 99999999999999999999 07:28:00 GMT", "3600"):
        send([httpx.Response(429, headers={"Retry-After": header}), httpx.Response(200)], attempts=2)
    number, until_date, malformed, far_date, hour = pauses
    assert number == 20
    assert 25 < until_date <= 30
    assert max(malformed, far_date) <= 1
    assert hour == MAX_PAUSE_SECONDS
    pauses.clear()
    send([*(httpx.ConnectError("x") for _ in range(2000)), httpx.Response(200)], attempts=2001)
    assert max(pauses) <= MAX_PAUSE_SECONDS


def test_long_bodies_are_cut() -> None:
    assert send([httpx.Response(200, text="x" * 1000)], attempts=1, max_bytes=10) == (200, b"x" * 10)
