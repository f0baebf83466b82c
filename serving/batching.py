"""Items of many requests in few runs of the model.

Nothing waits for company: an idle model runs what there is, and what arrives while it runs makes up the next batches.
Requests take turns, so that one of a thousand texts does not hold up those of one. Items of a turn are sorted by size
and cut into batches by what they cost with padding. What nobody waits for any more is skipped, and a batch that fails
is tried again in halves, so that an item that the model cannot take fails its own request only. What would wait too
long is refused when it comes: queues that only grow end in answers that nobody waits for any more.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCHES_A_TURN = 4
"""More items to sort make batches of more equal ones; fewer let a new request in sooner."""
WASTE = 1.15
"""A batch that would cost so many times what its items cost is cut, unless it is small."""
ITEMS_A_REQUEST = 32
"""Most items that a request puts into a turn before the next request is asked."""
MAX_DELAY = 20.0
"""Seconds that a request may wait for its turn: less than clients and proxies wait for an answer."""
MEMORY = 0.9
"""What a batch still counts for when the next one's pace is added to it: the pace is that of some ten batches."""


class BacklogError(Exception):
    """A request would wait too long for its turn; `excess` is how much too long, in seconds."""

    def __init__(self, excess: float) -> None:
        super().__init__(f"{excess:.1f} s too long")
        self.excess = excess


@dataclass
class BatchCounts:
    """What a batcher did since it was made."""

    items: int = 0
    batches: int = 0
    cost: int = 0
    """Cost of the items by themselves."""
    padded_cost: int = 0
    """Cost of the batches, in which all are as large as the largest."""
    skipped: int = 0
    """Items whose request went away before their turn."""
    failed: int = 0


class MicroBatcher(Generic[Item, Result]):
    """Runs a function over items from many requests, a batch at a time, off the event loop."""

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        cost: Callable[[Item], int],
        budget: int,
        executor: Executor,
        max_delay: float = MAX_DELAY,
    ) -> None:
        """A batcher without items.

        Args:
            run: gives one result for each item, in order. Called in `executor`.
            cost: size of an item.
            budget: most cost of a batch, in which each item counts as the largest does; one item may exceed it.
            executor: where `run` runs; the event loop is free meanwhile.
            max_delay: seconds that a request may have to wait for its turn; beyond, it is refused.
        """
        self.counts = BatchCounts()
        self._max_delay = max_delay
        self._recent_cost = self._recent_seconds = 0.0
        self._run, self._cost, self._budget, self._executor = run, cost, budget, executor
        self._requests: deque[deque[_Waiting[Item, Result]]] = deque()
        self._taken: list[_Waiting[Item, Result]] = []  # from their requests, for the turn that runs
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that wait for their turn."""
        return sum(len(request) for request in self._requests)

    @property
    def delay(self) -> float:
        """Seconds until whoever waits had a turn, at the pace of the latest batches; 0 before the first of them."""
        if not self._recent_cost:
            return 0.0
        shares = (islice(request, ITEMS_A_REQUEST) for request in self._requests)
        ahead = sum(entry.cost for entry in chain(self._taken, *shares) if not entry.future.done())
        return ahead * self._recent_seconds / self._recent_cost

    def admit(self) -> None:
        """Refuse what would wait too long, before anything is done for it.

        Raises:
            BacklogError: a request that comes now would not get its turn in `max_delay`.
        """
        if (excess := self.delay - self._max_delay) > 0:
            raise BacklogError(excess)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of a request's items, in their order.

        Raises:
            BacklogError: the request would wait too long.
            Exception: what the function raised for the first item that failed; the other items are given up.
        """
        self.admit()
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, self._cost(item), loop.create_future()) for item in items]
        self._requests.append(deque(waiting))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return await asyncio.gather(*(entry.future for entry in waiting))
        finally:  # an error or a client that went away: whoever of them still waits is skipped
            for entry in waiting:
                entry.future.cancel()

    async def _work(self) -> None:
        while self._requests:
            self._taken = self._turn()
            for batch in self._batches(self._taken):
                await self._run_batch(batch)
        self._taken = []

    def _turn(self) -> list["_Waiting[Item, Result]"]:
        """Items of all requests in turns, until they fill some batches."""
        turn: list[_Waiting[Item, Result]] = []
        cost = 0
        while self._requests and cost < BATCHES_A_TURN * self._budget:
            request = self._requests.popleft()
            taken = 0
            while request and taken < ITEMS_A_REQUEST and cost < BATCHES_A_TURN * self._budget:
                entry = request.popleft()
                if entry.future.done():
                    self.counts.skipped += 1
                    continue
                turn.append(entry)
                taken += 1
                cost += entry.cost
            if request:
                self._requests.append(request)
        return turn

    def _batches(self, turn: list["_Waiting[Item, Result]"]) -> Iterator[list["_Waiting[Item, Result]"]]:
        """The items in batches of similar ones, small ones first."""
        batch: list[_Waiting[Item, Result]] = []
        cost = 0
        for entry in sorted(turn, key=lambda entry: entry.cost):
            padded = (len(batch) + 1) * entry.cost
            wasteful = padded > WASTE * (cost + entry.cost) and padded > self._budget / 4
            if batch and (padded > self._budget or wasteful):
                yield batch
                batch, cost = [], 0
            batch.append(entry)
            cost += entry.cost
        if batch:
            yield batch

    async def _run_batch(self, batch: list["_Waiting[Item, Result]"]) -> None:
        live = [entry for entry in batch if not entry.future.done()]
        self.counts.skipped += len(batch) - len(live)
        if not live:
            return
        items, start = [entry.item for entry in live], time.perf_counter()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, items)
            answers = list(zip(live, results, strict=True))
        except Exception as error:
            if len(live) > 1:
                middle = len(live) // 2
                await self._run_batch(live[:middle])
                await self._run_batch(live[middle:])
                return
            self.counts.failed += 1
            if not live[0].future.done():
                live[0].future.set_exception(error)
            return
        costs = [entry.cost for entry in live]
        self._recent_cost = MEMORY * self._recent_cost + sum(costs)
        self._recent_seconds = MEMORY * self._recent_seconds + time.perf_counter() - start
        self.counts.items += len(live)
        self.counts.batches += 1
        self.counts.cost += sum(costs)
        self.counts.padded_cost += len(live) * max(costs)
        for entry, result in answers:
            if not entry.future.done():
                entry.future.set_result(result)


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    """An item in the queue."""

    item: Item
    cost: int
    future: asyncio.Future[Result]
