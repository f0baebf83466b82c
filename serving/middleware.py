"""ASGI middleware: who is let in, how many, how large and slow bodies may be, who left; ids; browsers' headers."""

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
"""The header of W3C's Trace Context, https://www.w3.org/TR/trace-context/; its group is the id of the trace."""
REQUEST_ID = re.compile(r"[\w.:/=+-]{1,128}", re.ASCII)


class ApiKeys:
    """Let in who shows a key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; others get 401.

    The page, its files, and what probes and monitoring ask for stay open: they tell nothing of texts and images.
    """

    PUBLIC = ("/", "/healthz", "/readyz", "/metrics", "/openapi.json")

    def __init__(self, app: ASGIApp, digests: frozenset[str]) -> None:
        self.app = app
        self.digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http" and self.digests and not self._open(scope) and not self._known(scope):
            refusal = error_response(
                401,
                "give an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        return path in self.PUBLIC or path.startswith("/static/")

    def _known(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            key = headers.get("x-api-key", "")
        digest = key_digest(key.strip())
        # All are compared, each in constant time: how long it takes tells nothing of any key.
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


def key_digest(key: str) -> str:
    """What the server keeps of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Admission:
    """Refuse with 429 what would wait behind too many requests, or hold too much memory, before its body is read.

    A body of `unannounced` length counts as that many bytes.
    """

    def __init__(self, app: ASGIApp, max_requests: int, max_bytes: int, unannounced: int) -> None:
        self.app = app
        self.max_requests, self.max_bytes, self.unannounced = max_requests, max_bytes, unannounced
        self.requests = self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":  # the others cost nothing, and tell how we are
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared) if declared.isdecimal() else self.unannounced
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


class GoneClients:
    """Give up what nobody waits for any more: a client that leaves ends the work on its request.

    Serve's own proxy does this by itself; HAProxy and other servers only tell the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        read = asyncio.Event()  # the body, to its end: the next news can only be that the client went away

        async def noted() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                read.set()
            return message

        async def left() -> None:
            await read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        work, watch = asyncio.ensure_future(self.app(scope, noted, send)), asyncio.ensure_future(left())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


class BodyLimit:
    """Refuse request bodies of more than `max_bytes` with 413, at the latest when that many were read.

    A body that has not arrived after `seconds` is refused with 408: a slow client would hold its place for ever.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the request body is larger than {self.max_bytes} bytes; send fewer or smaller items"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            await error_response(413, message, "body_too_large")(scope, receive, send)
            return
        received, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def limited() -> Message:
            nonlocal received, whole
            if whole:  # what comes now is the news that the client went away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    event = await receive()
            except TimeoutError:
                late = f"the request body did not arrive within {self.seconds:g} s"
                raise ApiError(408, late, "request_timeout") from None
            received += len(event.get("body", b""))
            whole = not event.get("more_body", False)
            if received > self.max_bytes:  # a body without a length, or with a wrong one
                raise ApiError(413, message, "body_too_large")
            return event

        await self.app(scope, limited, send)


class BrowserHeaders:
    """Tell browsers to run nothing but our own script, to believe content types, and to ask whether a file changed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self.app(scope, receive, with_headers)


class RequestId:
    """Settle the id of a request before Serve does: the trace of a `traceparent`, else a fit `X-Request-ID`.

    Serve makes one where none is left, answers with it as `X-Request-ID`, and writes it as `request_id` into every line
    of its log that is about the request, whatever deployment writes it. It takes any text for an id; we do not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            if trace := TRACEPARENT.fullmatch(headers.get("traceparent", "")):
                headers["X-Request-ID"] = trace[1]
            elif not REQUEST_ID.fullmatch(headers.get("x-request-id", "")):
                del headers["X-Request-ID"]
        await self.app(scope, receive, send)


def before_serve() -> list[Middleware]:
    """What stands in front of all of Serve, where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names this function."""
    return [Middleware(RequestId)]
