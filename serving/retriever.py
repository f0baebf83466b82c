"""Shards of an index on several machines: a deployment that holds them, and the searcher that asks it.

A retriever holds no version of its own. Every question names the shard that it is for, and Serve's multiplexing sends
it to a retriever that has that shard open, or lets one open it. So while an application is updated, its old replicas
and its new ones ask any retriever, each for shards of its own version, and no answer mixes two.
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
from serving.index_source import IndexVersion, open_shard, reread
from serving.searcher import LocalSearcher, Target, check_target, index_info

MAX_SHARDS = 16
"""Shards that a retriever holds open; memory-mapped, so memory goes to those parts of them that are searched."""
ATTEMPTS = 3
"""How often a question is asked while retrievers that get it die."""

Question = Literal["search", "vector", "thumbnail", "examples", "check"]


def check_retrievers(count: int, version: IndexVersion) -> None:
    """Raises `ConfigError` where so many retrievers cannot hold an index beside the version that it replaces."""
    needed = math.ceil(2 * len(version.manifest.shards) / MAX_SHARDS)
    if count < needed:
        raise ConfigError(
            f"retrievers={count}: the index has {len(version.manifest.shards)} shards, of which a retriever holds"
            f" {MAX_SHARDS // 2}, and as many of the next version; set retrievers={needed} or more"
        )


def verify_shards(version: IndexVersion) -> None:
    """Open every shard once, in Ray tasks on whatever nodes there are, whose caches keep what was downloaded.

    Raises:
        SearchIndexError: one is damaged: refused here, and not by retrievers that replaced those that served.
    """
    opening = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_verify)
    try:
        ray.get([opening.remote(version, number) for number in range(len(version.manifest.shards))])
    except RayTaskError as error:
        raise error.cause from None


def _verify(version: IndexVersion, number: int) -> None:
    open_shard(version, number)


class Retriever:
    """A process that answers for the shards that it was asked for most lately."""

    def __init__(self, cache: str) -> None:
        self._cache = cache

    async def ask(self, question: Question, *arguments: Any) -> Any:
        """What the shard that the request names answers to a method of `Searcher`."""
        shard = await self._shard(serve.get_multiplexed_model_id())
        method: Callable[..., Awaitable[Any]] = getattr(shard, question)
        return await method(*arguments)

    @serve.multiplexed(max_num_models_per_replica=MAX_SHARDS)
    async def _shard(self, name: str) -> LocalSearcher:
        return await asyncio.to_thread(self._open, name)

    def _open(self, name: str) -> LocalSearcher:
        uri, number, digest = name.rsplit("#", 2)
        return LocalSearcher(open_shard(reread(uri, digest, self._cache), int(number)))


class ShardedSearcher:
    """An index whose shards retrievers hold. All of them answer, or none does: no hits are left out silently."""

    def __init__(self, version: IndexVersion, retrievers: DeploymentHandle) -> None:
        self.info = index_info(version.manifest)
        """What the index says of itself."""
        self._shards = [
            retrievers.options(multiplexed_model_id=f"{version.uri}#{number}#{version.digest}")
            for number in range(len(version.manifest.shards))
        ]

    async def search(
        self, query: np.ndarray, top_k: int, target: Target, filter: dict[str, Any] | None, exact: bool
    ) -> list[Match]:
        """The `top_k` best matches of a unit vector `[E]`, best first."""
        check_target(self.info, target)
        return merge_matches(await self._ask_all("search", query, top_k, target, filter, exact), top_k)

    async def vector(self, id: str, target: Target) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None where the index has no such id."""
        check_target(self.info, target)
        return _first(await self._ask_all("vector", id, target))

    async def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None where the index has no such id."""
        return _first(await self._ask_all("thumbnail", id))

    async def examples(self, count: int) -> list[str]:
        """Some captions of the index."""
        return await _ask(self._shards[0], "examples", count)

    async def check(self) -> None:
        """Raises where a shard cannot be searched."""
        await self._ask_all("check")

    async def _ask_all(self, question: Question, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(_ask(shard, question, *arguments) for shard in self._shards))


async def _ask(shard: DeploymentHandle, question: Question, *arguments: Any) -> Any:
    for _ in range(ATTEMPTS):
        try:
            return await shard.ask.remote(question, *arguments)
        except RayActorError:  # it died with the question; asking changes nothing, so another is asked
            continue
        except RayTaskError as error:
            if isinstance(error.cause, ApiError):
                raise error.cause from None
            raise
    raise ApiError(503, "a part of the index cannot be reached; try again", "index_unavailable")


def _first(answers: list[Any]) -> Any:
    return next((answer for answer in answers if answer is not None), None)
