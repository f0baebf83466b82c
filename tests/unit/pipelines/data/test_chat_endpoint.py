"""Summaries by a server with OpenAI's chat completions, against a small one on this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from longclip.errors import ConfigError
from pipelines.data.summaries import endpoint
from pipelines.data.summaries.preflight import check_strategies
from pipelines.data.summaries.settings import SummarySettings
from pipelines.data.summaries.summarizers import checked_summaries, load_summarizer

PROMPT = "shorten: {caption}"


class Server(ThreadingHTTPServer):
    """Answers with the caption in capitals, or as the caption asks it to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.status = 200
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Nothing: some tests leave before they are answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            seen = sum(earlier == body for _, _, earlier in server.requests)
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        caption = body["messages"][-1]["content"].removeprefix("shorten: ")
        status, text = server.status, f"Summary: {caption.upper()}"
        answer: dict[str, Any] = {"choices": [{"message": {"content": text}}]}
        if "slow" in caption:
            threading.Event().wait(0.3)
        if ("busy" in caption and seen < 2) or "never" in caption:
            status = 503
        if "too long" in caption:
            status = 400
        if "elsewhere" in caption:
            status = 307
        if "odd" in caption:
            answer = {"choices": []}
        if "parts" in caption:
            answer = {"choices": [{"message": {"content": [{"text": "A dog."}]}}]}
        if "silent" in caption:
            answer = {"choices": [{"message": {"content": None}}]}
        with server.lock:
            server.at_once -= 1
        self.send_response(status)
        if status == 307:
            self.send_header("Location", f"{server.url}/stolen")
        if status == 503:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(json.dumps(answer if status == 200 else {"error": f"status {status}"}).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine, and no keys of the environment."""
    monkeypatch.setenv("no_proxy", "*")
    for name in endpoint.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited before another try."""
    waited: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited


def settings_of(url: str, **values: Any) -> SummarySettings:
    group = {"url": url, "model": "small", "prompt": PROMPT, **values}
    return SummarySettings.model_validate({"strategy": "endpoint", "endpoint": group})


def summaries(url: str, captions: list[str], **values: Any) -> list[str]:
    settings = settings_of(url, **values)
    check_strategies(settings)
    return load_summarizer("endpoint", settings)(captions, [str(number) for number in range(len(captions))])


def test_requests_and_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("LONGCLIP_LLM_API_KEY", "secret")
    captions = [f"slow dog {number}" for number in range(9)]
    texts = summaries(f"{server.url}/", captions, concurrency=3, options={"seed": 1, "temperature": None})
    assert texts == [f"Summary: {caption.upper()}" for caption in captions]
    assert server.most_at_once == 3
    path, key, body = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body.pop("messages")[0]["role"] == "system"
    assert body == {"model": "small", "max_tokens": 96, "seed": 1}
    found, sources, replaced = checked_summaries("endpoint", texts, captions, settings_of(server.url).checks)
    assert (found[0], set(sources), replaced) == ("SLOW DOG 0", {"endpoint"}, {})


def test_no_key_is_sent_where_there_is_none(server: Server) -> None:
    assert summaries(server.url, ["dog"]) == ["Summary: DOG"]
    assert server.requests[0][1] is None


def test_single_failures_are_empty_summaries(server: Server, pauses: list[float]) -> None:
    captions = ["dog", "busy bus", "too long", "never", "odd", "parts", "silent", "elsewhere", "cat"]
    texts = summaries(server.url, captions, concurrency=1, attempts=3)
    assert texts == ["Summary: DOG", "Summary: BUSY BUS", "", "", "", "", "", "", "Summary: CAT"]
    assert pauses == [7, 7, 7, 7], "two before the busy server answered, two before it never did"
    assert all(path == "/v1/chat/completions" for path, _, _ in server.requests), "no redirect is followed"
    assert summaries(server.url, ["too long"]) == [""]


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_setting_ends_the_job(server: Server, pauses: list[float], status: int) -> None:
    server.status = status
    with pytest.raises(ConfigError, match=f"refuses model 'small': {status} .*LONGCLIP_LLM_API_KEY"):
        summaries(server.url, ["dog", "cat"])
    assert not pauses


def test_a_server_that_answers_nothing_ends_the_job(server: Server, pauses: list[float]) -> None:
    server.status = 422
    with pytest.raises(ConfigError, match=r"answers no request: 422 .*status 422"):
        summaries(server.url, [f"dog {number}" for number in range(100)], concurrency=1)
    assert len(server.requests) < 20, "it must not ask a hundred times"
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match=r"answers no request: .*refused"):
        summaries(server.url, ["dog", "cat"], attempts=3)
    assert sorted(pauses) == [1, 1, 2, 2]


def test_a_silent_server_is_left(server: Server, pauses: list[float]) -> None:
    assert summaries(server.url, ["dog", "slow cat"], timeout_seconds=0.1, attempts=2) == ["Summary: DOG", ""]
    assert pauses == [1]
