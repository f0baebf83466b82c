"""HTTP requests with retries, for every job that calls a server."""

import contextlib
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

RETRIED_CLIENT_ERRORS = (408, 409, 425, 429)
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0


def send_with_retries(
    client: httpx.Client, request: httpx.Request, attempts: int, max_bytes: int
) -> tuple[httpx.Response, bytes]:
    """Send a request; send it again after a lost connection, a timeout, 429 or 5xx.

    Pauses start at one second and double, with jitter. A pause is at least as long as the server's `Retry-After`, and
    never longer than `MAX_PAUSE_SECONDS`.

    Args:
        client: its timeouts apply to each attempt.
        request: its body must be in memory, so that it can be sent again.
        attempts: maximum number of times that the request is sent, at least 1.
        max_bytes: the rest of a longer response body is not read.

    Returns:
        The last response, whatever its status, and its body.

    Raises:
        httpx.RequestError: the last attempt got no complete response.
    """
    for attempt in range(attempts):
        is_last = attempt + 1 == attempts
        pause = _backoff_seconds(attempt)
        try:
            with contextlib.closing(client.send(request, stream=True)) as response:
                body = _read(response, max_bytes)
        except httpx.RequestError:
            if is_last:
                raise
        else:
            if is_last or not _is_retried(response.status_code):
                return response, body
            pause = max(pause, _retry_after_seconds(response.headers.get("Retry-After", "")))
        time.sleep(min(pause, MAX_PAUSE_SECONDS))
    raise ValueError(f"attempts={attempts} must be at least 1")


def _is_retried(status: int) -> bool:
    return status >= 500 or status in RETRIED_CLIENT_ERRORS


def _backoff_seconds(attempt: int) -> float:
    longest = min(FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 16), MAX_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1)


def _retry_after_seconds(header: str) -> float:
    """Seconds that `Retry-After` asks for, as a number or a date; 0 where it is absent or malformed."""
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):  # the latter for a year of many digits
        return 0.0
    return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def _read(response: httpx.Response, max_bytes: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) >= max_bytes:
            break
    return bytes(body[:max_bytes])
