"""Searching an index on behalf of requests."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from longclip.errors import DataError
from longclip.index import Filter, Manifest, Match, PublishedIndex, parse_filter
from serving import schemas
from serving.batching import MicroBatcher
from serving.errors import ApiError

Target = Literal["image", "caption"]
MAX_BATCH_QUERIES = 32


class Searcher(Protocol):
    """An index, in this process or in others."""

    @property
    def info(self) -> schemas.IndexInfo:
        """Description of the index."""

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first; raises `ApiError`."""

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None if the index has no such id."""

    async def thumbnail(self, id: str) -> bytes | None:
        """The thumbnail of an item as JPEG; None if the index has no such id."""

    async def examples(self, count: int) -> list[str]:
        """At most `count` captions of the index."""

    async def check(self) -> None:
        """Raise an exception if the index cannot be searched."""


class LocalSearcher:
    """An index in this process. Concurrent queries with equal options share one pass over its vectors."""

    def __init__(self, index: PublishedIndex) -> None:
        self.info = index_info(index.manifest)
        """Description of the index."""
        self._index = index
        self._batcher = MicroBatcher(self._run, lambda _: 1, MAX_BATCH_QUERIES, ThreadPoolExecutor(1, "search"))

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first; raises `ApiError`."""
        check_target(self.info, target)
        parsed = request_filter(filter, self._index.filter_schema)
        (matches,) = await self._batcher.submit([_Call(query, top_k, target, parsed, exact)])
        return matches

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None if the index has no such id."""
        check_target(self.info, target)
        return self._index.vector(id, target)

    async def thumbnail(self, id: str) -> bytes | None:
        """The thumbnail of an item as JPEG; None if the index has no such id."""
        return self._index.thumbnail(id)

    async def examples(self, count: int) -> list[str]:
        """At most `count` captions of the index."""
        return self._index.examples(count)

    async def check(self) -> None:
        """Nothing to do: an open index can be searched."""

    def _run(self, calls: list["_Call"]) -> list[list[Match]]:
        batches: dict[tuple[Target, bool], list[int]] = {}
        results: list[list[Match]] = [[] for _ in calls]
        for row, call in enumerate(calls):
            if call.filter is None:
                batches.setdefault((call.target, call.exact), []).append(row)
            else:
                (results[row],) = self._index.search(call.query[None], call.top_k, call.target, call.filter, call.exact)
        for (target, exact), rows in batches.items():
            queries = np.stack([calls[row].query for row in rows])
            top_k = max(calls[row].top_k for row in rows)
            for row, matches in zip(rows, self._index.search(queries, top_k, target, exact=exact), strict=True):
                results[row] = matches[: calls[row].top_k]
        return results


@dataclass(frozen=True)
class _Call:
    """A queued search."""

    query: np.ndarray
    top_k: int
    target: Target
    filter: Filter | None
    exact: bool


def check_target(info: schemas.IndexInfo, target: Target) -> None:
    """Raise `ApiError` if an index has no vectors of a target."""
    if target not in info.targets:
        raise ApiError(422, f"target: this index has no vectors of '{target}'", "invalid_value", "target")


def request_filter(filter: dict[str, Any] | None, schema: Mapping[str, pa.DataType]) -> Filter | None:
    """Parse the filter of a request against the columns of the index; raises `ApiError`."""
    if filter is None:
        return None
    try:
        return parse_filter(filter, schema)
    except DataError as error:
        raise ApiError(422, f"filter: {error}", "invalid_filter", "filter") from None


def index_info(manifest: Manifest) -> schemas.IndexInfo:
    """Description of an index in responses."""
    return schemas.IndexInfo(
        version=manifest.version,
        checkpoint_id=manifest.checkpoint_id,
        count=manifest.count,
        embedding_dim=manifest.embedding_dim,
        engine=manifest.engine["name"],
        targets=manifest.targets,
        metadata=manifest.metadata,
        source=manifest.source,
        created=manifest.created,
    )
