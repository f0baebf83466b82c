"""A Python client of the server: batching, concurrent requests, retries. `pip install "longclip[client]"` installs it.

with Client("http://127.0.0.1:8000", api_key="...") as client:
    vectors = client.embed(["a dog", Path("photo.jpg")])
    hits = client.search(text="two boats under a bridge", top_k=5, filter={"year": {"gte": 1990}})["hits"]

async with AsyncClient(url) as client:
    vectors = await client.embed(texts, progress=lambda done, total: print(done, total))
"""

import asyncio
import base64
import io
import os
import random
from asyncio import sleep
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

API_KEY = "LONGCLIP_API_KEY"
RETRIED_STATUSES = (429, 503)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
TEXTS_PER_REQUEST, IMAGES_PER_REQUEST = 256, 16
"""Below the server's limits, so that requests of several clients can take turns."""

Input = str | bytes | Path | Image.Image
"""A text, or an image as encoded bytes, file path or Pillow image."""


class ServerError(Exception):
    """The server refused a request, or could not be reached after all retries."""

    def __init__(self, status: int | None, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None if there was no response."""
        self.code = code
        """Stable short name of the reason."""
        self.param = param
        """The part of the request at fault, such as `input[3]`, counted from 0 over all items of the call."""


class AsyncClient:
    """Client for asyncio. Use it as a context manager, or call `close`."""

    def __init__(
        self, url: str, api_key: str | None = None, *, retries: int = 5, requests_at_once: int = 4, timeout: float = 120
    ) -> None:
        """Create a client; this sends nothing.

        Args:
            url: URL of the server, including the route prefix, if any.
            api_key: sent with every request; None uses the environment variable `LONGCLIP_API_KEY`.
            retries: maximum number of retries after statuses 429 and 503 and lost connections.
            requests_at_once: maximum number of concurrent requests.
            timeout: seconds per attempt.
        """
        key = api_key or os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
        self._retries = retries
        self._slots = asyncio.Semaphore(requests_at_once)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def embed(
        self,
        inputs: Iterable[Input],
        *,
        truncate: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> np.ndarray:
        """Unit-length embeddings `[N, E]` float32 of texts and images, in input order.

        Args:
            inputs: N texts and images.
            truncate: truncate texts that are too long; otherwise they are refused.
            progress: called after each request with the number of finished items and of all items.

        Raises:
            ServerError: a request was refused or failed.
        """
        items = list(inputs)
        requests = _split(items)
        vectors: list[np.ndarray] = [np.zeros(0, np.float32)] * len(items)
        done = 0

        async def request(rows: Sequence[int]) -> None:
            nonlocal done
            body = {"input": [_item(items[row]) for row in rows], "encoding_format": "base64", "truncate": truncate}
            try:
                answer = await self._post("/v1/embeddings", body)
            except ServerError as error:
                error.param = _renumbered(error.param, rows)
                raise
            for row, entry in zip(rows, answer["data"], strict=True):
                vectors[row] = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
            done += len(rows)
            if progress is not None:
                progress(done, len(items))

        tasks = [asyncio.ensure_future(request(rows)) for rows in requests]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    async def search(
        self,
        *,
        text: str | None = None,
        image: bytes | Path | Image.Image | None = None,
        id: str | None = None,
        embedding: Sequence[float] | np.ndarray | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The response to a search by exactly one of text, image, id and embedding; its `hits` are best first.

        Args:
            text: a description.
            image: an image as encoded bytes, file path or Pillow image.
            id: id of an indexed item.
            embedding: a vector of the model, `[E]`.
            options: `top_k`, `target`, `filter`, `min_score`, `exact`, `truncate`, as in the API.

        Raises:
            ServerError: the request was refused or failed.
        """
        query: dict[str, Any] = {"text": text, "id": id}
        if image is not None:
            query |= _item(image)
        if embedding is not None:
            query["embedding"] = np.asarray(embedding, np.float64).tolist()
        query = {name: value for name, value in query.items() if value is not None}
        return await self._post("/v1/search", {"query": query, **options})

    async def classify(
        self, inputs: Iterable[Input], labels: Sequence[str], templates: Sequence[str] | None = None, **options: Any
    ) -> list[dict[str, float]]:
        """Probability of each label for each text or image, best first.

        Args:
            inputs: texts and images.
            labels: at least two labels.
            templates: prompts in which `{}` is replaced by the label; None uses the server's default.
            options: `top_k`, `truncate`, as in the API.

        Raises:
            ServerError: the request was refused or failed.
        """
        body: dict[str, Any] = {"input": [_item(item) for item in inputs], "labels": list(labels), **options}
        if templates is not None:
            body["templates"] = list(templates)
        answer = await self._post("/v1/classify", body)
        return [{label["label"]: label["probability"] for label in entry["labels"]} for entry in answer["data"]]

    async def info(self) -> dict[str, Any]:
        """The model, the index, and the limits of a request."""
        return await self._request("GET", "/info")

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        async with self._slots:
            return await self._request("POST", path, json=body)

    async def _request(self, method: str, path: str, **content: Any) -> Any:
        """Send a request with retries. Pauses double, with jitter, and respect `Retry-After`."""
        for attempt in range(self._retries + 1):
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            try:
                response = await self._http.request(method, path, **content)
            except httpx.TransportError as error:
                failure = ServerError(None, f"{self._http.base_url} cannot be reached: {type(error).__name__}")
            else:
                if response.is_success:
                    return response.json()
                failure = _refusal(response)
                if response.status_code not in RETRIED_STATUSES:
                    raise failure
                pause = max(pause, _retry_after(response))
            if attempt < self._retries:
                await sleep(pause)
        raise failure


class Client:
    """Blocking client with the methods and arguments of `AsyncClient`."""

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(_make(url, api_key, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._runner.run(self._client.close())
        self._runner.close()

    def embed(self, inputs: Iterable[Input], **options: Any) -> np.ndarray:
        """See `AsyncClient.embed`."""
        return self._runner.run(self._client.embed(inputs, **options))

    def search(self, **query: Any) -> dict[str, Any]:
        """See `AsyncClient.search`."""
        return self._runner.run(self._client.search(**query))

    def classify(self, inputs: Iterable[Input], labels: Sequence[str], **options: Any) -> list[dict[str, float]]:
        """See `AsyncClient.classify`."""
        return self._runner.run(self._client.classify(inputs, labels, **options))

    def info(self) -> dict[str, Any]:
        """See `AsyncClient.info`."""
        return self._runner.run(self._client.info())


async def _make(url: str, api_key: str | None, options: dict[str, Any]) -> AsyncClient:
    """A coroutine, so that the client is created in the event loop that will use it."""
    return AsyncClient(url, api_key, **options)


def _split(items: Sequence[Input]) -> list[list[int]]:
    """Item numbers of each request. Each request has only texts or only images."""
    texts = [row for row, item in enumerate(items) if isinstance(item, str)]
    images = [row for row, item in enumerate(items) if not isinstance(item, str)]
    return [
        rows[start : start + size]
        for rows, size in ((texts, TEXTS_PER_REQUEST), (images, IMAGES_PER_REQUEST))
        for start in range(0, len(rows), size)
    ]


def _item(item: Input) -> dict[str, str]:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Path):
        item = item.read_bytes()
    elif isinstance(item, Image.Image):
        out = io.BytesIO()
        item.save(out, "PNG")
        item = out.getvalue()
    return {"image": base64.b64encode(item).decode()}


def _renumbered(param: str | None, rows: Sequence[int]) -> str | None:
    """Translate `input[3]` of one request to the item number of the whole call."""
    head, _, number = (param or "").partition("[")
    number, _, tail = number.partition("]")
    return f"{head}[{rows[int(number)]}]{tail}" if number.isdecimal() and int(number) < len(rows) else param


def _refusal(response: httpx.Response) -> ServerError:
    try:
        error = response.json()["error"]
        return ServerError(response.status_code, error["message"], error["code"], error["param"])
    except (ValueError, KeyError, TypeError):  # from a proxy
        return ServerError(response.status_code, f"the server responded with status {response.status_code}")


def _retry_after(response: httpx.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), LONGEST_PAUSE_S) if seconds.isdecimal() else 0.0
