"""ASGI middleware: API keys, admission, body limits, disconnects, browser headers, request ids."""

import asyncio
import hashlib
import hmac
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, error_response, overloaded

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""Header of W3C Trace Context, https://www.w3.org/TR/trace-context/; group 1 is the trace id."""
REQUEST_ID = re.compile(r"[\w.:/=+-]{1,128}", re.ASCII)


class ApiKeys:
    """Require an API key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; without one the response is 401.

    The page, its files and the routes of probes and monitoring need no key: they reveal nothing about texts and images.
    """

    PUBLIC = ("/", "/healthz", "/readyz", "/metrics", "/openapi.json")

    def __init__(self, app: ASGIApp, digests: frozenset[str]) -> None:
        self.app = app
        self.digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and self.digests and not self._is_public(scope) and not self._has_key(scope):
            refusal = error_response(
                401,
                "give an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        return path in self.PUBLIC or path.startswith("/static/")

    def _has_key(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            key = headers.get("x-api-key", "")
        digest = key_digest(key.strip())
        # Compares all digests, each in constant time, so that the duration reveals nothing about the keys.
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


def key_digest(key: str) -> str:
    """SHA-256 of an API key, hexadecimal: the server keeps no keys."""
    return hashlib.sha256(key.encode()).hexdigest()


class Admission:
    """Refuse requests above `max_requests` in progress or `max_bytes` of bodies with 429, before reading the body.

    A body without a `Content-Length` counts as `default_bytes`. A single request is admitted whatever its size.
    """

    def __init__(self, app: ASGIApp, max_requests: int, max_bytes: int, default_bytes: int) -> None:
        self.app = app
        self.max_requests, self.max_bytes, self.default_bytes = max_requests, max_bytes, default_bytes
        self.requests = self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":  # the others are cheap, and report health
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared) if declared.isdecimal() else self.default_bytes
        if self.requests >= self.max_requests or (self.requests and self.bytes + size > self.max_bytes):
            await overloaded()(scope, receive, send)
            return
        self.requests += 1
        self.bytes += size
        try:
            await self.app(scope, receive, send)
        finally:
            self.requests -= 1
            self.bytes -= size


class CancelOnDisconnect:
    """Cancel the work on a request when its client disconnects.

    Serve's proxy does this itself; HAProxy and other servers only notify the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body_read = asyncio.Event()  # after the body, the only further message is a disconnect

        async def receive_body() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                body_read.set()
            return message

        async def disconnected() -> None:
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self.app(scope, receive_body, send))
        watch = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


class BodyLimit:
    """Refuse request bodies of more than `max_bytes` with 413, and those that take longer than `seconds` with 408.

    Without the time limit, a slow client would occupy one of the admitted requests forever.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the request body is larger than {self.max_bytes} bytes; send fewer or smaller items"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            await error_response(413, message, "body_too_large")(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def receive_limited() -> Message:
            nonlocal received, complete
            if complete:  # only a disconnect can follow
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    event = await receive()
            except TimeoutError:
                late = f"the request body did not arrive within {self.seconds:g} s"
                raise ApiError(408, late, "request_timeout") from None
            received += len(event.get("body", b""))
            complete = not event.get("more_body", False)
            if received > self.max_bytes:  # without a Content-Length, or with a wrong one
                raise ApiError(413, message, "body_too_large")
            return event

        await self.app(scope, receive_limited, send)


class BrowserHeaders:
    """Make browsers run only the page's own script, trust content types, and revalidate cached files."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self.app(scope, receive, send_with_headers)


class RequestId:
    """Set the request id before Serve does: the trace id of a `traceparent`, otherwise a valid `X-Request-ID`.

    Serve generates an id if there is none, returns it as `X-Request-ID`, and logs it as `request_id` in each line about
    the request, in all deployments. Serve accepts any text as an id; this middleware removes invalid ones.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            if trace := TRACEPARENT.fullmatch(headers.get("traceparent", "")):
                headers["X-Request-ID"] = trace[1]
            elif not REQUEST_ID.fullmatch(headers.get("x-request-id", "")):
                del headers["X-Request-ID"]
        await self.app(scope, receive, send)


def before_serve() -> list[Middleware]:
    """Middleware of Serve's proxy; used if `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names this function."""
    return [Middleware(RequestId)]
