"""An OpenAI-compatible chat completions server with scripted failures."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class ChatServer(ThreadingHTTPServer):
    """Replies with the last message in capitals; words in that message select a failure, see `ChatHandler`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        """Path, Authorization header and body of each request."""
        self.status = 200
        """Status of all replies."""
        self.active = self.max_active = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Print nothing: some clients disconnect before the reply."""

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class ChatHandler(BaseHTTPRequestHandler):
    """One request."""

    server: ChatServer

    def do_POST(self) -> None:
        """Reply to a chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        authorization = self.headers.get("Authorization")
        with server.lock:
            attempts_before = sum(earlier == body for _, _, earlier in server.requests)
            server.requests.append((self.path, authorization, body))
            server.active += 1
            server.max_active = max(server.max_active, server.active)
        message = body["messages"][-1]["content"]
        status = server.status
        reply: dict[str, Any] = {"choices": [{"message": {"content": message.upper()}}]}
        if "slow" in message:
            threading.Event().wait(0.3)
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
        with server.lock:
            server.active -= 1
        self.send_response(status)
        if status == 307:
            self.send_header("Location", f"{server.url}/redirected")
        if status == 503:
            self.send_header("Retry-After", "7")
        content = json.dumps(reply if status == 200 else {"error": f"status {status} for {authorization}"}).encode()
        self.send_header("Content-Length", str(len(content) + ("cut off" in message)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A server on this machine, with no proxy and no API key in the environment."""
    monkeypatch.setenv("no_proxy", "*")
    for name in ("LONGCLIP_LLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()
