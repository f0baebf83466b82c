"""Batching items of concurrent requests.

The batcher never waits for a batch to fill up: an idle model runs what is queued, and items that arrive meanwhile form
the next batches. Requests take turns, so one of a thousand texts does not delay one of a single text. The items of a
turn are sorted by size and split into batches by their cost including padding. Items of cancelled requests are skipped.
A batch that fails is retried in halves, so an item that the model cannot process fails only its own request. Requests
that would wait too long are refused on arrival: if a queue only grows, clients time out before they are served.
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

BATCHES_PER_TURN = 4
"""Longer turns give batches of more similar items; shorter ones let new requests start sooner."""
MAX_PADDING = 1.15
"""Maximum ratio of the cost of a batch to that of its items; small batches may exceed it."""
ITEMS_PER_REQUEST = 32
"""Maximum number of items taken from a request before the next request has its turn."""
MAX_DELAY = 20.0
"""Maximum wait of a request for its turn in seconds: below the timeouts of clients and proxies."""
DECAY = 0.9
"""Decay of past batches in the estimated speed: an average over about ten batches."""


class BacklogError(Exception):
    """A request would wait too long for its turn: `excess` seconds longer than allowed."""

    def __init__(self, excess: float) -> None:
        super().__init__(f"{excess:.1f} s too long")
        self.excess = excess


@dataclass
class BatchCounts:
    """Totals of a batcher since it was created."""

    items: int = 0
    batches: int = 0
    cost: int = 0
    """Cost of the items without padding."""
    padded_cost: int = 0
    """Cost of the batches: each item counts as the largest of its batch."""
    skipped: int = 0
    """Items whose request was cancelled before their turn."""
    failed: int = 0


class MicroBatcher(Generic[Item, Result]):
    """Runs a function on batches of items from many requests, outside the event loop."""

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        cost: Callable[[Item], int],
        budget: int,
        executor: Executor,
        max_delay: float = MAX_DELAY,
    ) -> None:
        """Create an empty batcher.

        Args:
            run: returns one result per item, in order. Called in `executor`.
            cost: size of an item.
            budget: maximum cost of a batch including padding; a single item may exceed it.
            executor: runs `run`.
            max_delay: maximum wait for a turn in seconds; requests that would wait longer are refused.
        """
        self.counts = BatchCounts()
        self._max_delay = max_delay
        self._recent_cost = self._recent_seconds = 0.0
        self._run, self._cost, self._budget, self._executor = run, cost, budget, executor
        self._requests: deque[deque[_Waiting[Item, Result]]] = deque()
        self._current_turn: list[_Waiting[Item, Result]] = []
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of items waiting for their turn."""
        return sum(len(request) for request in self._requests)

    @property
    def delay(self) -> float:
        """Estimated seconds until a new request has its turn; 0 before the first batch has run."""
        if not self._recent_cost:
            return 0.0
        shares = (islice(request, ITEMS_PER_REQUEST) for request in self._requests)
        ahead = sum(entry.cost for entry in chain(self._current_turn, *shares) if not entry.future.done())
        return ahead * self._recent_seconds / self._recent_cost

    def admit(self) -> None:
        """Check whether a new request would have its turn in time.

        Raises:
            BacklogError: it would wait longer than `max_delay`.
        """
        if (excess := self.delay - self._max_delay) > 0:
            raise BacklogError(excess)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of the items of a request, in their order.

        Raises:
            BacklogError: the request would wait too long.
            Exception: raised by the function for the first item that failed; the other items are cancelled.
        """
        self.admit()
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, self._cost(item), loop.create_future()) for item in items]
        self._requests.append(deque(waiting))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return await asyncio.gather(*(entry.future for entry in waiting))
        finally:  # after an error or a disconnect, the remaining items are skipped
            for entry in waiting:
                entry.future.cancel()

    async def _work(self) -> None:
        while self._requests:
            self._current_turn = self._turn()
            for batch in self._batches(self._current_turn):
                await self._run_batch(batch)
        self._current_turn = []

    def _turn(self) -> list["_Waiting[Item, Result]"]:
        """Take items of all requests in turns, until they fill some batches."""
        turn: list[_Waiting[Item, Result]] = []
        cost = 0
        while self._requests and cost < BATCHES_PER_TURN * self._budget:
            request = self._requests.popleft()
            taken = 0
            while request and taken < ITEMS_PER_REQUEST and cost < BATCHES_PER_TURN * self._budget:
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
        """Split items into batches of similar size, smallest first."""
        batch: list[_Waiting[Item, Result]] = []
        cost = 0
        for entry in sorted(turn, key=lambda entry: entry.cost):
            padded = (len(batch) + 1) * entry.cost
            wasteful = padded > MAX_PADDING * (cost + entry.cost) and padded > self._budget / 4
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
            pairs = list(zip(live, results, strict=True))
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
        self._recent_cost = DECAY * self._recent_cost + sum(costs)
        self._recent_seconds = DECAY * self._recent_seconds + time.perf_counter() - start
        self.counts.items += len(live)
        self.counts.batches += 1
        self.counts.cost += sum(costs)
        self.counts.padded_cost += len(live) * max(costs)
        for entry, result in pairs:
            if not entry.future.done():
                entry.future.set_result(result)


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    """A queued item."""

    item: Item
    cost: int
    future: asyncio.Future[Result]
