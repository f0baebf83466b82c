"""How a replica searches an index."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from serving import schemas
from serving.batching import MicroBatcher
from serving.errors import ApiError
from serving.index import SearchIndex

Target = Literal["image", "caption"]
MAX_BATCH_QUERIES = 32


@dataclass(frozen=True)
class Match:
    """An item that answers a query."""

    id: str
    score: float
    caption: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Searcher(Protocol):
    """An index, wherever it lies."""

    @property
    def info(self) -> schemas.IndexInfo:
        """What the index says of itself."""

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first."""

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None where the index has no such id."""

    async def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None where the index has no such id."""

    async def examples(self, count: int) -> list[str]:
        """Some captions of the index."""

    async def check(self) -> None:
        """Raises where the index cannot be searched."""


class LocalSearcher:
    """An index in this process. Queries that arrive together share one pass over its vectors."""

    def __init__(self, index: SearchIndex) -> None:
        self._index = index
        self._batcher = MicroBatcher(self._run, lambda _: 1, MAX_BATCH_QUERIES, ThreadPoolExecutor(1, "search"))

    @property
    def info(self) -> schemas.IndexInfo:
        """What the index says of itself."""
        return schemas.IndexInfo.model_validate(self._index.manifest)

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first."""
        if target != "image":
            raise ApiError(422, f"target: this index has no vectors of '{target}'", "invalid_value", "target")
        if filter is not None:
            raise ApiError(422, "filter: this index has no metadata", "invalid_value", "filter")
        (matches,) = await self._batcher.submit([(query, top_k)])
        return matches

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None where the index has no such id."""
        return self._index.vector(id)

    async def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None where the index has no such id."""
        return self._index.thumbnail(id)

    async def examples(self, count: int) -> list[str]:
        """Some captions of the index."""
        return self._index.examples(count)

    async def check(self) -> None:
        """An index in memory answers."""

    def _run(self, calls: list[tuple[np.ndarray, int]]) -> list[list[Match]]:
        queries = np.stack([query for query, _ in calls])
        found = self._index.search(queries, max(top_k for _, top_k in calls))
        return [
            [Match(match.id, match.score, match.caption) for match in matches[:top_k]]
            for matches, (_, top_k) in zip(found, calls, strict=True)
        ]
