"""The deployment that holds the index."""

import asyncio

import numpy as np
from ray import serve

from serving.index import Manifest, Match, SearchIndex, SearchIndexError

MAX_BATCH_QUERIES = 32


class Retriever:
    """Exact search in one index. Queries that arrive together share one pass over its vectors."""

    def __init__(self, directory: str, manifest: Manifest) -> None:
        self._index = SearchIndex.open(directory)
        if self._index.manifest != manifest:
            raise SearchIndexError(f"index '{directory}' changed since the application was built; deploy again")

    async def search(self, query: np.ndarray, top_k: int) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`."""
        return await self._search((query, top_k))

    async def search_like(self, id: str, top_k: int) -> list[Match] | None:
        """The `top_k` best matches of an item, without itself; None where the index has no such id."""
        query = self._index.vector(id)
        if query is None:
            return None
        matches = await self._search((query, top_k + 1))
        return [match for match in matches if match.id != id][:top_k]

    @serve.batch(max_batch_size=MAX_BATCH_QUERIES, batch_wait_timeout_s=0.0)
    async def _search(self, calls: list[tuple[np.ndarray, int]]) -> list[list[Match]]:
        return await asyncio.to_thread(self._search_together, calls)

    def _search_together(self, calls: list[tuple[np.ndarray, int]]) -> list[list[Match]]:
        matches = self._index.search(np.stack([query for query, _ in calls]), max(top_k for _, top_k in calls))
        return [found[:top_k] for found, (_, top_k) in zip(matches, calls, strict=True)]

    def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None where the index has no such id."""
        return self._index.thumbnail(id)

    def examples(self, count: int) -> list[str]:
        """Some captions of the index."""
        return self._index.examples(count)

    def ready(self) -> bool:
        """Answers once the index is loaded."""
        return True
