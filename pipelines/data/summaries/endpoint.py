"""Summaries by a server with OpenAI's chat completions: vLLM, SGLang, Ollama, or a service on the internet.

Requests run in threads of one worker. `ray.data.llm` has an HTTP stage too, but that sends the requests of a worker one
after the other, and ends the job when one of them fails for good.
"""

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from longclip.errors import ConfigError, one_line
from pipelines.data.summaries.settings import Endpoint

KEY_VARIABLES = ("LONGCLIP_LLM_API_KEY", "OPENAI_API_KEY")
WRONG_SETTING = (401, 403, 404, 405)
WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_ANSWER_BYTES = 1 << 20
LONGEST_PAUSE_SECONDS = 30.0
ENOUGH_FAILURES = 8
"""One caption may be too long, or break the server. When the first so many all fail, it is not for the captions."""


class RequestError(Exception):
    """One caption got no summary; the others may."""


class EndpointSummaries:
    """Summaries by a server; empty for a caption whose request failed for good."""

    def __init__(self, settings: Endpoint) -> None:
        self.settings = settings
        self.url = f"{settings.url}/chat/completions"
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption.

        Raises:
            ConfigError: the server refuses the key, knows no such address or model, or answers nothing.
        """
        answers: list[str | RequestError] = []
        patience = min(len(captions), max(ENOUGH_FAILURES, self.settings.concurrency))
        with ThreadPoolExecutor(self.settings.concurrency) as threads:
            for answer in threads.map(self._try, captions):
                answers.append(answer)
                failed = isinstance(answer, RequestError)
                if failed and len(answers) == patience > 1 and not any(isinstance(each, str) for each in answers):
                    raise ConfigError(
                        f"endpoint.url='{self.settings.url}' answers no request: {answer}; check endpoint.url,"
                        " endpoint.model and endpoint.options, and that the server is up"
                    )
        return [answer if isinstance(answer, str) else "" for answer in answers]

    def _try(self, caption: str) -> str | RequestError:
        try:
            return self._ask(caption)
        except RequestError as failure:
            return failure

    def _ask(self, caption: str) -> str:
        request = self._request(caption)
        for attempt in range(self.settings.attempts):
            pause = 2.0**attempt
            try:
                with self.opener.open(request, timeout=self.settings.timeout_seconds) as response:
                    return answer_text(response.read(MAX_ANSWER_BYTES))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason} {_error_text(error)}".strip()
                if error.code in WRONG_SETTING:
                    raise ConfigError(
                        f"endpoint.url='{self.settings.url}' refuses model '{self.settings.model}': {problem};"
                        f" check endpoint.url and endpoint.model, and the key in {' or '.join(KEY_VARIABLES)}"
                    ) from error
                if error.code not in WORTH_ANOTHER_TRY:
                    raise RequestError(problem) from error
                pause = _seconds(error.headers.get("Retry-After")) or pause
            except (OSError, HTTPException) as error:  # no connection, a timeout, an answer cut off
                problem = one_line(error, 200) or type(error).__name__
            if attempt + 1 < self.settings.attempts:
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise RequestError(problem)

    def _request(self, caption: str) -> urllib.request.Request:
        values: dict[str, Any] = {
            "model": self.settings.model,
            "messages": self.settings.messages(caption),
            "max_tokens": self.settings.max_new_tokens,
            "temperature": 0,
        }
        values = {name: value for name, value in (values | self.settings.options).items() if value is not None}
        return urllib.request.Request(self.url, json.dumps(values).encode(), self.headers, method="POST")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to a place that no setting names: it fails with its own status instead."""

    def redirect_request(self, *_: Any) -> None:
        return None


def answer_text(body: bytes) -> str:
    """The first choice's text in a chat completion; empty where the model wrote none.

    Raises:
        RequestError: the body is no chat completion.
    """
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        text = body
    if not isinstance(text, str | None):
        raise RequestError(f"no chat completion: {one_line(body[:200].decode(errors='replace'), 200)}")
    return text or ""


def _error_text(error: urllib.error.HTTPError) -> str:
    with error, contextlib.suppress(OSError, HTTPException):  # the server may break off here too
        return one_line(error.read(1000).decode(errors="replace"), 200)
    return ""


def _seconds(header: str | None) -> float | None:
    return float(header) if header and header.strip().isdigit() else None
