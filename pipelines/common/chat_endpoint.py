"""A client of OpenAI-compatible chat completions: vLLM, SGLang, Ollama or a hosted service.

Concurrent requests run in threads of one worker. The HTTP stage of `ray.data.llm` sends the requests of a worker one
after another, and ends the job when one of them fails.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from longclip.errors import ConfigError, one_line
from pipelines.common.http_retries import send_with_retries
from pipelines.common.settings import Settings

KEY_VARIABLES = ("LONGCLIP_LLM_API_KEY", "OPENAI_API_KEY")
SETTING_ERRORS = (401, 403, 404, 405)
"""Statuses that mean a wrong key, address or model: no other request would fare better."""
MAX_REPLY_BYTES = 1 << 20
MIN_FAILURES = 8
"""One conversation may be too long or crash the server. When this many in a row fail, the server is at fault."""

Messages = list[dict[str, Any]]
"""A conversation: `{"role": ..., "content": ...}` for each message."""


class EndpointSettings(Settings):
    """An OpenAI-compatible server. Its API key is read from LONGCLIP_LLM_API_KEY, or else OPENAI_API_KEY."""

    url: str | None = None
    """Base URL of the API, e.g. http://localhost:8000/v1; `/chat/completions` is appended."""
    model: str | None = None
    """Name of the model on the server."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Additional fields of each request; null removes a default field (max_tokens, temperature)."""
    concurrency: PositiveInt = 8
    """Concurrent requests per worker."""
    timeout_seconds: PositiveFloat = 60.0
    """Seconds without a byte from the server after which an attempt fails."""
    attempts: PositiveInt = 4
    """Maximum number of attempts per request; retried are lost connections, timeouts, 429 and 5xx."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"is not a URL: {error}; give one such as http://localhost:8000/v1") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("is not an HTTP URL; give one such as http://localhost:8000/v1")
        if parsed.userinfo:
            raise ValueError("must not contain credentials; set LONGCLIP_LLM_API_KEY instead")
        return url.rstrip("/").removesuffix("/chat/completions")


class RequestError(Exception):
    """One conversation got no reply; others may."""


class ReplyError(RequestError):
    """The server answered with something that is not a chat completion; the same request may succeed."""


@dataclass(frozen=True)
class Completion:
    """What a server replied."""

    text: str
    """The message; empty where the model wrote nothing."""
    finish_reason: str | None = None
    """Why the model stopped: `stop`, `length`, `content_filter`, `refusal`; None if the server does not say."""
    prompt_tokens: int | None = None
    """Tokens of the conversation; None if the server does not say."""
    completion_tokens: int | None = None
    """Tokens of the reply; None if the server does not say."""


class ChatEndpoint:
    """Sends conversations to a server."""

    def __init__(self, settings: EndpointSettings, max_tokens: int) -> None:
        """
        Args:
            settings: `url` and `model` must be set; errors name the fields as `endpoint.<field>`.
            max_tokens: maximum number of tokens in a reply.

        Raises:
            ConfigError: the API key cannot be sent.
        """
        self.settings, self.max_tokens = settings, max_tokens
        self.url = f"{settings.url}/chat/completions"
        self._key = _api_key()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=settings.timeout_seconds,
            limits=httpx.Limits(max_connections=settings.concurrency),
            follow_redirects=False,  # a redirect would carry the key to an address that no setting names
        )

    def complete_all(self, conversations: Sequence[Messages]) -> list[str]:
        """The reply to each conversation; empty where its request failed.

        Raises:
            ConfigError: the server rejects the key, the address or the model, or the first requests all fail.
        """
        replies: list[str | RequestError] = []
        enough = min(len(conversations), max(MIN_FAILURES, self.settings.concurrency))
        with ThreadPoolExecutor(self.settings.concurrency) as threads:
            for reply in threads.map(self._complete_or_error, conversations):
                replies.append(reply)
                failed = isinstance(reply, RequestError)
                if failed and len(replies) == enough > 1 and not any(isinstance(each, str) for each in replies):
                    raise ConfigError(
                        f"endpoint.url='{self.settings.url}': all of the first {enough} requests failed, the last with:"
                        f" {reply}; check endpoint.url, endpoint.model and endpoint.options, and that the server is"
                        " running"
                    )
        return [reply if isinstance(reply, str) else "" for reply in replies]

    def complete(self, messages: Messages) -> Completion:
        """The reply to a conversation.

        Raises:
            ConfigError: the server rejects the key, the address or the model.
            RequestError: no reply after all attempts, or the server rejects this conversation.
        """
        values = {
            "model": self.settings.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            **self.settings.options,
        }
        values = {name: value for name, value in values.items() if value is not None}
        request = self._client.build_request("POST", self.url, json=values)
        try:
            response, body = send_with_retries(self._client, request, self.settings.attempts, MAX_REPLY_BYTES)
        except httpx.RequestError as error:
            raise RequestError(one_line(error, 200) or type(error).__name__) from error
        if response.is_success:
            try:
                return completion_of(body)
            except ReplyError as error:
                raise ReplyError(self._without_key(str(error))) from None
        problem = self._without_key(f"{response.status_code} {response.reason_phrase} {_excerpt(body)}".strip())
        if response.status_code in SETTING_ERRORS:
            raise ConfigError(
                f"endpoint.url='{self.settings.url}' rejects model '{self.settings.model}': {problem}; check"
                f" endpoint.url and endpoint.model, and the key in {' or '.join(KEY_VARIABLES)}"
            )
        raise RequestError(problem)

    def _complete_or_error(self, messages: Messages) -> str | RequestError:
        try:
            return self.complete(messages).text
        except RequestError as error:
            return error

    def _without_key(self, text: str) -> str:
        """Servers may repeat the key in their error messages."""
        return text.replace(self._key, "***") if self._key else text


def completion_of(body: bytes) -> Completion:
    """The first choice of a chat completion.

    Raises:
        ReplyError: the body is not a chat completion.
    """
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        text = _joined(choice["message"]["content"])
    except (ValueError, LookupError, TypeError, RecursionError):
        text = body
    if not isinstance(text, str | None):
        raise ReplyError(f"the reply is not a chat completion: {_excerpt(body)}")
    finish_reason, refusal = choice.get("finish_reason"), choice["message"].get("refusal")
    usage = reply.get("usage")
    prompt_tokens, completion_tokens = (
        usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
    )
    return Completion(
        text=text or (refusal if isinstance(refusal, str) else ""),
        finish_reason="refusal" if refusal else finish_reason if isinstance(finish_reason, str) else None,
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else None,
        completion_tokens=completion_tokens if isinstance(completion_tokens, int) else None,
    )


def _joined(content: Any) -> Any:
    """A message; the texts of one in parts, which some servers send for models that think."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _excerpt(body: bytes) -> str:
    return one_line(body[:1000].decode(errors="replace"), 200)


def _api_key() -> str | None:
    for name in KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{name} contains characters that an HTTP header cannot carry; set it to the key alone")
        if key:
            return key
    return None
