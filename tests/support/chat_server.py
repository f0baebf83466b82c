"""An OpenAI-compatible chat completions server with scripted failures."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest


class ChatServer(ThreadingHTTPServer):
    """Replies with the last message in capitals; words in that message select a failure, see `reply`."""

    request_queue_size = 256

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), ChatHandler)
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        """Path, Authorization header and body of each request."""
        self.attempts = Counter[bytes]()
        """Number of times that each body was sent."""
        self.status = 200
        """Status of all replies."""
        self.retry_after = "7"
        """Seconds that a client shall wait after 429 and 503."""
        self.active = self.max_active = 0
        self.lock = threading.Lock()

    def reply(self, body: dict[str, Any], attempts_before: int) -> tuple[int, dict[str, Any], int]:
        """Status and JSON of the reply to a request, and how many bytes it lacks."""
        message = body["messages"][-1]["content"]
        status = self.status
        reply: dict[str, Any] = {"choices": [{"message": {"content": message.upper()}}]}
        if "slow" in message:
            threading.Event().wait(1.5)
        if ("busy" in message and attempts_before < 2) or "unavailable" in message:
            status = 503
        if "too long" in message:
            status = 400
        if "redirected" in message:
            status = 307
        if "no choices" in message:
            reply = {"choices": [], "echo": message}
        if "content parts" in message:
            reply = {"choices": [{"message": {"content": [{"text": "A dog."}]}}]}
        if "null content" in message:
            reply = {"choices": [{"message": {"content": None}}]}
        return status, reply, int("cut off" in message)

    def handle_error(self, *_: Any) -> None:
        """Print nothing: some clients disconnect before the reply."""

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.server_port}/v1"


ServerT = TypeVar("ServerT", bound=ChatServer)


class ChatHandler(BaseHTTPRequestHandler):
    """One request."""

    server: ChatServer

    def do_POST(self) -> None:
        """Reply to a chat completion."""
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(sent)
        server = self.server
        authorization = self.headers.get("Authorization")
        with server.lock:
            attempts_before = server.attempts[sent]
            server.attempts[sent] += 1
            server.requests.append((self.path, authorization, body))
            server.active += 1
            server.max_active = max(server.max_active, server.active)
        status, reply, missing_bytes = server.reply(body, attempts_before)
        with server.lock:
            server.active -= 1
        self.send_response(status)
        if status == 307:
            self.send_header("Location", f"{server.url}/redirected")
        if status in (429, 503):
            self.send_header("Retry-After", server.retry_after)
        content = json.dumps(reply if status == 200 else {"error": f"status {status} for {authorization}"}).encode()
        self.send_header("Content-Length", str(len(content) + missing_bytes))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def running(server: ServerT) -> Iterator[ServerT]:
    """Serve requests while the block runs."""
    with server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no API key in the environment."""
    monkeypatch.setenv("no_proxy", "*")
    for name in ("LONGCLIP_LLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def chat_server(no_keys: None) -> Iterator[ChatServer]:
    """A server on this machine."""
    with running(ChatServer()) as server:
        yield server
