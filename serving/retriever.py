"""A sharded index: a deployment whose processes hold the shards, and the searcher that queries it.

A retriever is not tied to an index version. Each call names its shard, and Serve's multiplexing routes it to one
that has this shard open, or makes one open it. During an update, old and new replicas therefore share the retrievers,
each querying shards of its version, and no response mixes two versions.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from longclip.errors import ConfigError
from longclip.index import Match, merge_matches
from serving.errors import ApiError
from serving.index_source import IndexVersion, find_pinned_version, open_shard
from serving.searcher import LocalSearcher, Target, check_target, index_info

MAX_SHARDS = 16
"""Maximum number of open shards in a retriever. They are memory-mapped, so only the parts searched use memory."""
ATTEMPTS = 3
"""Maximum number of attempts at a call whose retriever dies."""

Method = Literal["search", "vector", "thumbnail", "examples", "check"]


def check_retrievers(count: int, version: IndexVersion) -> None:
    """Raise `ConfigError` if `count` retrievers cannot hold an index together with the version that it replaces."""
    needed = math.ceil(2 * len(version.manifest.shards) / MAX_SHARDS)
    if count < needed:
        raise ConfigError(
            f"retrievers={count}: the index has {len(version.manifest.shards)} shards, and a retriever holds"
            f" {MAX_SHARDS // 2} of them plus as many of the next version; set retrievers={needed} or more"
        )


def verify_shards(version: IndexVersion) -> None:
    """Open each shard once, in Ray tasks spread over the nodes; their caches keep the downloads.

    Retrievers that failed on a damaged shard would already have replaced working ones.

    Raises:
        SearchIndexError: a shard is damaged.
    """
    opening = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_verify)
    try:
        ray.get([opening.remote(version, number) for number in range(len(version.manifest.shards))])
    except RayTaskError as error:
        raise error.cause from None


def _verify(version: IndexVersion, number: int) -> None:
    open_shard(version, number)


class Retriever:
    """A process that holds the most recently used shards."""

    def __init__(self, cache: str) -> None:
        self._cache = cache

    async def call(self, method: Method, *arguments: Any) -> Any:
        """Call a method of `Searcher` on the shard that is the multiplexed model id of the request."""
        shard = await self._shard(serve.get_multiplexed_model_id())
        bound: Callable[..., Awaitable[Any]] = getattr(shard, method)
        return await bound(*arguments)

    @serve.multiplexed(max_num_models_per_replica=MAX_SHARDS)
    async def _shard(self, name: str) -> LocalSearcher:
        return await asyncio.to_thread(self._open, name)

    def _open(self, name: str) -> LocalSearcher:
        uri, number, digest = name.rsplit("#", 2)
        return LocalSearcher(open_shard(find_pinned_version(uri, digest, self._cache), int(number)))


class ShardedSearcher:
    """An index held by retrievers. If a shard cannot be searched, the search fails; hits are never omitted silently."""

    def __init__(self, version: IndexVersion, retrievers: DeploymentHandle) -> None:
        self.info = index_info(version.manifest)
        """Description of the index."""
        self._shards = [
            retrievers.options(multiplexed_model_id=f"{version.uri}#{number}#{version.digest}")
            for number in range(len(version.manifest.shards))
        ]

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first; raises `ApiError`."""
        check_target(self.info, target)
        return merge_matches(await self._call_all("search", query, top_k, target, filter, exact), top_k)

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None if the index has no such id."""
        check_target(self.info, target)
        return _first(await self._call_all("vector", id, target))

    async def thumbnail(self, id: str) -> bytes | None:
        """The thumbnail of an item as JPEG; None if the index has no such id."""
        return _first(await self._call_all("thumbnail", id))

    async def examples(self, count: int) -> list[str]:
        """At most `count` captions of the index."""
        return await _call(self._shards[0], "examples", count)

    async def check(self) -> None:
        """Raise an exception if a shard cannot be searched."""
        await self._call_all("check")

    async def _call_all(self, method: Method, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(_call(shard, method, *arguments) for shard in self._shards))


async def _call(shard: DeploymentHandle, method: Method, *arguments: Any) -> Any:
    for _ in range(ATTEMPTS):
        try:
            return await shard.call.remote(method, *arguments)
        except RayActorError:  # it died; the methods have no side effects, so retry on another
            continue
        except RayTaskError as error:
            if isinstance(error.cause, ApiError):
                raise error.cause from None
            raise
    raise ApiError(503, "a part of the index is unavailable; try again", "index_unavailable")


def _first(results: list[Any]) -> Any:
    return next((result for result in results if result is not None), None)
