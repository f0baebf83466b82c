"""The client of chat completions, against a small server on this machine."""

import json
from typing import Any

import pytest

from longclip.errors import ConfigError
from pipelines.common import http_retries
from pipelines.common.chat_endpoint import (
    ChatEndpoint,
    Completion,
    EndpointSettings,
    ReplyError,
    RequestError,
    completion_of,
)
from tests.support.chat_server import ChatServer


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited before retries."""
    seconds: list[float] = []
    monkeypatch.setattr(http_retries.time, "sleep", seconds.append)
    monkeypatch.setattr(http_retries.random, "uniform", lambda low, high: high)
    return seconds


def endpoint_of(url: str, **values: Any) -> ChatEndpoint:
    return ChatEndpoint(EndpointSettings(url=url, model="small", **values), max_tokens=96)


def replies(url: str, texts: list[str], **values: Any) -> list[str]:
    return endpoint_of(url, **values).complete_all([[{"role": "user", "content": text}] for text in texts])


def test_requests_run_concurrently_and_replies_keep_their_order(
    chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("LONGCLIP_LLM_API_KEY", "secret\n")
    texts = [f"slow dog {number}" for number in range(9)]
    options = {"seed": 1, "temperature": None}
    assert replies(f"{chat_server.url}/", texts, concurrency=3, options=options) == [text.upper() for text in texts]
    assert chat_server.max_active == 3
    path, authorization, body = chat_server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert body.pop("messages")[0]["role"] == "user"
    assert body == {"model": "small", "max_tokens": 96, "seed": 1}


def test_no_authorization_header_without_a_key(chat_server: ChatServer) -> None:
    assert replies(chat_server.url, ["dog"]) == ["DOG"]
    assert chat_server.requests[0][1] is None


def test_failed_requests_give_empty_replies(chat_server: ChatServer, pauses: list[float]) -> None:
    texts = ["dog", "busy", "too long", "unavailable", "no choices", "content parts", "null content", "redirected", "x"]
    assert replies(chat_server.url, texts, concurrency=1, attempts=3) == ["DOG", "BUSY", "", "", "", "", "", "", "X"]
    assert pauses == [7, 7, 7, 7], "two before the busy server replied, two before the unavailable one was given up"
    assert all(path == "/v1/chat/completions" for path, _, _ in chat_server.requests), "redirects must not be followed"
    assert replies(chat_server.url, ["too long"]) == [""]


@pytest.mark.parametrize("status", [401, 404])
def test_rejected_key_or_model_ends_the_job(chat_server: ChatServer, pauses: list[float], status: int) -> None:
    chat_server.status = status
    with pytest.raises(ConfigError, match=f"rejects model 'small': {status} .*LONGCLIP_LLM_API_KEY"):
        replies(chat_server.url, ["dog", "cat"])
    assert not pauses


def test_server_that_rejects_every_request_ends_the_job(chat_server: ChatServer) -> None:
    chat_server.status = 422
    with pytest.raises(ConfigError, match=r"first 8 requests failed, .*: 422 .*status 422"):
        replies(chat_server.url, [f"dog {number}" for number in range(100)], concurrency=1)
    assert len(chat_server.requests) < 20, "it must not send all 100"


def test_unreachable_server_ends_the_job(chat_server: ChatServer, pauses: list[float]) -> None:
    chat_server.shutdown()
    chat_server.server_close()
    with pytest.raises(ConfigError, match=r"first 2 requests failed, .*refused"):
        replies(chat_server.url, ["dog", "cat"], attempts=3)
    assert sorted(pauses) == [1, 1, 2, 2]


@pytest.mark.parametrize("text", ["slow cat", "cut off"])
def test_timeouts_and_broken_connections_are_retried(chat_server: ChatServer, pauses: list[float], text: str) -> None:
    assert replies(chat_server.url, ["dog", text], timeout_seconds=0.7, attempts=2) == ["DOG", ""]
    assert pauses == [1]


def test_key_is_never_in_an_error(chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for status, error in ((401, ConfigError), (422, RequestError)):
        chat_server.status = status
        with pytest.raises(error, match=rf"status {status} for Bearer \*\*\*") as raised:
            endpoint_of(chat_server.url).complete([{"role": "user", "content": "dog"}])
        assert "secret" not in str(raised.value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\x07key")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY contains characters") as raised:
        endpoint_of(chat_server.url)
    assert "secret" not in str(raised.value)


def test_completion_has_the_reason_of_its_end_and_its_tokens() -> None:
    def completion(message: dict[str, Any], **reply: Any) -> Completion:
        choice = {"message": message, "finish_reason": reply.pop("finish_reason", None)}
        return completion_of(json.dumps({"choices": [choice], **reply}).encode())

    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    assert completion({"content": "A dog."}, finish_reason="stop", usage=usage) == Completion("A dog.", "stop", 7, 3)
    assert completion({"content": "A dog."}, usage={"prompt_tokens": "7"}) == Completion("A dog.")
    assert completion({"content": "A dog."}, usage=None) == Completion("A dog.")
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]
    assert completion({"content": parts}) == Completion("A dog.")
    assert completion({"content": None, "refusal": "No."}, finish_reason="stop") == Completion("No.", "refusal")
    for body in (b"", b"{", b"[1]", b"\xff", b'{"choices": [{"message": "x"}]}', b"[" * 100_000):
        with pytest.raises(ReplyError, match="not a chat completion"):
            completion_of(body)


def test_key_is_not_in_the_error_of_an_unreadable_reply(
    chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "no choices")
    with pytest.raises(ReplyError, match="not a chat completion") as raised:
        endpoint_of(chat_server.url).complete([{"role": "user", "content": "no choices"}])
    assert "no choices" not in str(raised.value)
