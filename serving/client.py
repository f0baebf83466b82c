"""A Python client of the server: batches, several requests at once, retries. Needs httpx, numpy and Pillow only.

client = Client("http://127.0.0.1:8000", api_key="...")
vectors = client.embed(["a dog", Path("photo.jpg")])
hits = client.search(text="two boats under a bridge", top_k=5, filter={"year": {"gte": 1990}})["hits"]

async with AsyncClient(url) as client:
    vectors = await client.embed(texts, progress=lambda done, of: print(done, of))
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
RETRIED = (429, 503)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
TEXTS_A_REQUEST, IMAGES_A_REQUEST = 256, 16
"""Small enough that requests of a client take turns with those of others; the server allows more."""

Input = str | bytes | Path | Image.Image
"""A text, or an image: encoded bytes, the path of a file, or a picture in memory."""


class ServerError(Exception):
    """The server refused a request, or could not be reached after all retries."""

    def __init__(self, status: int | None, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where there was no answer."""
        self.code = code
        """Stable short name of the reason."""
        self.param = param
        """Where in the request the reason lies, such as `input[3]`: of the items of one call, counted from 0."""


class AsyncClient:
    """Client for asyncio; a context, or `close` it."""

    def __init__(
        self, url: str, api_key: str | None = None, *, retries: int = 5, requests_at_once: int = 4, timeout: float = 120
    ) -> None:
        """A client; nothing is sent yet.

        Args:
            url: of the server, with a path where the API is reached under one.
            api_key: sent with every request; `LONGCLIP_API_KEY` of the environment where None.
            retries: further tries after answers 429 and 503 and lost connections; after other errors there are none.
            requests_at_once: most requests that are under way.
            timeout: seconds for one try.
        """
        key = api_key or os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
        self._retries = retries
        self._turns = asyncio.Semaphore(requests_at_once)

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
        """Unit-length embeddings `[N, E]` float32 of texts and images, in their order.

        Args:
            inputs: N texts and images.
            truncate: cut texts that are too long; otherwise they are refused.
            progress: called with the items that are done and all items, after every request.
        """
        items = list(inputs)
        parts = _parts(items)
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

        tasks = [asyncio.ensure_future(request(rows)) for rows in parts]
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
        """Hits for a text, an image, an item of the index, or a vector; exactly one of them.

        Args:
            text: a description.
            image: an image.
            id: an item of the index.
            embedding: a vector of the model.
            options: `top_k`, `target`, `filter`, `min_score`, `exact`, `truncate`, as the API has them.
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
        """Probability of each label for each text or image, best first; `templates` hold `{}` for the label."""
        body: dict[str, Any] = {"input": [_item(item) for item in inputs], "labels": list(labels), **options}
        if templates is not None:
            body["templates"] = list(templates)
        answer = await self._post("/v1/classify", body)
        return [{label["label"]: label["probability"] for label in entry["labels"]} for entry in answer["data"]]

    async def info(self) -> dict[str, Any]:
        """The model, the index, and the limits of a request."""
        return await self._request("GET", "/info")

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        async with self._turns:
            return await self._request("POST", path, json=body)

    async def _request(self, method: str, path: str, **content: Any) -> Any:
        """Answer of a request; pauses double, with jitter, and are as long as the server asks for at least."""
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
                if response.status_code not in RETRIED:
                    raise failure
                pause = max(pause, _retry_after(response))
            if attempt < self._retries:
                await sleep(pause)
        raise failure


class Client:
    """The same without asyncio: every call waits for its result. See `AsyncClient` for what it takes."""

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        self._loop = asyncio.Runner()
        self._client = self._loop.run(_make(url, api_key, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._loop.run(self._client.close())
        self._loop.close()

    def embed(self, inputs: Iterable[Input], **options: Any) -> np.ndarray:
        """See `AsyncClient.embed`."""
        return self._loop.run(self._client.embed(inputs, **options))

    def search(self, **query: Any) -> dict[str, Any]:
        """See `AsyncClient.search`."""
        return self._loop.run(self._client.search(**query))

    def classify(self, inputs: Iterable[Input], labels: Sequence[str], **options: Any) -> list[dict[str, float]]:
        """See `AsyncClient.classify`."""
        return self._loop.run(self._client.classify(inputs, labels, **options))

    def info(self) -> dict[str, Any]:
        """See `AsyncClient.info`."""
        return self._loop.run(self._client.info())


async def _make(url: str, api_key: str | None, options: dict[str, Any]) -> AsyncClient:
    """In the loop that will use it."""
    return AsyncClient(url, api_key, **options)


def _parts(items: Sequence[Input]) -> list[list[int]]:
    """Rows of each request: texts with texts, images with images."""
    texts = [row for row, item in enumerate(items) if isinstance(item, str)]
    images = [row for row, item in enumerate(items) if not isinstance(item, str)]
    return [
        rows[start : start + size]
        for rows, size in ((texts, TEXTS_A_REQUEST), (images, IMAGES_A_REQUEST))
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
    """`input[3]` of one request as the item of the whole call."""
    head, _, number = (param or "").partition("[")
    number, _, tail = number.partition("]")
    return f"{head}[{rows[int(number)]}]{tail}" if number.isdecimal() and int(number) < len(rows) else param


def _refusal(response: httpx.Response) -> ServerError:
    try:
        error = response.json()["error"]
        return ServerError(response.status_code, error["message"], error["code"], error["param"])
    except (ValueError, KeyError, TypeError):  # a proxy in between
        return ServerError(response.status_code, f"the server answered {response.status_code}")


def _retry_after(response: httpx.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), LONGEST_PAUSE_S) if seconds.isdecimal() else 0.0
