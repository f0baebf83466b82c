"""How a replica searches an index."""

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
    """An index in this process. Queries that arrive together and ask alike share one pass over its vectors."""

    def __init__(self, index: PublishedIndex) -> None:
        self.info = index_info(index.manifest)
        """What the index says of itself."""
        self._index = index
        self._batcher = MicroBatcher(self._run, lambda _: 1, MAX_BATCH_QUERIES, ThreadPoolExecutor(1, "search"))

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first."""
        check_target(self.info, target)
        parsed = read_filter(filter, self._index.filter_schema)
        (matches,) = await self._batcher.submit([_Call(query, top_k, target, parsed, exact)])
        return matches

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None where the index has no such id."""
        check_target(self.info, target)
        return self._index.vector(id, target)

    async def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None where the index has no such id."""
        return self._index.thumbnail(id)

    async def examples(self, count: int) -> list[str]:
        """Some captions of the index."""
        return self._index.examples(count)

    async def check(self) -> None:
        """An index in memory answers."""

    def _run(self, calls: list["_Call"]) -> list[list[Match]]:
        alike: dict[tuple[Target, bool], list[int]] = {}
        answers: list[list[Match]] = [[] for _ in calls]
        for place, call in enumerate(calls):
            if call.filter is None:
                alike.setdefault((call.target, call.exact), []).append(place)
            else:
                (answers[place],) = self._index.search(
                    call.query[None], call.top_k, call.target, call.filter, call.exact
                )
        for (target, exact), places in alike.items():
            queries = np.stack([calls[place].query for place in places])
            most = max(calls[place].top_k for place in places)
            found = self._index.search(queries, most, target, exact=exact)
            for place, matches in zip(places, found, strict=True):
                answers[place] = matches[: calls[place].top_k]
        return answers


@dataclass(frozen=True)
class _Call:
    """A search that waits for its turn."""

    query: np.ndarray
    top_k: int
    target: Target
    filter: Filter | None
    exact: bool


def check_target(info: schemas.IndexInfo, target: Target) -> None:
    """Raises `ApiError` where an index has no vectors of a target."""
    if target not in info.targets:
        raise ApiError(422, f"target: this index has no vectors of '{target}'", "invalid_value", "target")


def read_filter(filter: dict[str, Any] | None, schema: Mapping[str, pa.DataType]) -> Filter | None:
    """The filter of a request, checked against the columns of the index; raises `ApiError`."""
    if filter is None:
        return None
    try:
        return parse_filter(filter, schema)
    except DataError as error:
        raise ApiError(422, f"filter: {error}", "invalid_filter", "filter") from None


def index_info(manifest: Manifest) -> schemas.IndexInfo:
    """What the API says of an index."""
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
