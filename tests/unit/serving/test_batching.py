"""Batching: order, cost, fairness, cancellation, failures, refusals."""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.batching import BATCHES_PER_TURN, ITEMS_PER_REQUEST, BacklogError, MicroBatcher

pytestmark = pytest.mark.anyio

FAILING = 13


class Recorder:
    """A function to be batched: squares numbers, records the batches, and waits while its gate is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()

    def __call__(self, numbers: list[int]) -> Sequence[int]:
        self.running.set()
        assert self.gate.wait(10)
        self.batches.append(numbers)
        if FAILING in numbers:
            raise ValueError("thirteen")
        return [number * number for number in numbers]


def batcher_of(
    recorder: Callable[[list[int]], Sequence[int]], budget: int = 100, max_delay: float = math.inf
) -> MicroBatcher[int, int]:
    return MicroBatcher(recorder, lambda number: number, budget, ThreadPoolExecutor(1), max_delay)


async def start_blocked(recorder: Recorder, batcher: MicroBatcher[int, int]) -> asyncio.Task[list[int]]:
    """Start a request that keeps the function busy until its gate is opened."""
    recorder.gate.clear()
    first = asyncio.create_task(batcher.submit([1]))
    await asyncio.to_thread(recorder.running.wait, 10)
    return first


async def test_results_are_in_input_order() -> None:
    recorder = Recorder()
    numbers = [5, 90, 2, 40, 7]
    assert await batcher_of(recorder).submit(numbers) == [number * number for number in numbers]


async def test_queued_requests_share_batches_of_similar_items_within_the_budget() -> None:
    recorder = Recorder()
    batcher = batcher_of(recorder)
    first = await start_blocked(recorder, batcher)
    others = [asyncio.create_task(batcher.submit([small, large])) for small, large in ((9, 48), (10, 50), (11, 49))]
    await asyncio.sleep(0)
    assert batcher.waiting == 6
    recorder.gate.set()
    assert await asyncio.gather(first, *others) == [[1], [81, 2304], [100, 2500], [121, 2401]]
    assert recorder.batches == [[1], [9, 10, 11], [48, 49], [50]]
    assert all(len(batch) * max(batch) <= 100 for batch in recorder.batches)
    assert (batcher.counts.items, batcher.counts.batches) == (7, 4)
    assert (batcher.counts.cost, batcher.counts.padded_cost) == (1 + 30 + 147, 1 + 33 + 98 + 50)


async def test_an_item_above_the_budget_runs_alone() -> None:
    recorder = Recorder()
    assert await batcher_of(recorder).submit([500, 1, 2]) == [250_000, 1, 4]
    assert [500] in recorder.batches


async def test_a_large_request_does_not_delay_a_small_one() -> None:
    recorder = Recorder()
    batcher = batcher_of(recorder)
    first = await start_blocked(recorder, batcher)
    large = asyncio.create_task(batcher.submit([20] * 400))
    small = asyncio.create_task(batcher.submit([3]))
    await asyncio.sleep(0)
    recorder.gate.set()
    assert await small == [9]
    assert not large.done()
    position = next(number for number, batch in enumerate(recorder.batches) if 3 in batch)
    assert position <= BATCHES_PER_TURN + 1
    assert await large == [400] * 400
    await first


async def test_cancelled_items_are_skipped() -> None:
    recorder = Recorder()
    batcher = batcher_of(recorder)
    first = await start_blocked(recorder, batcher)
    cancelled = asyncio.create_task(batcher.submit([4, 5, 6]))
    remaining = asyncio.create_task(batcher.submit([7]))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    recorder.gate.set()
    assert await asyncio.gather(first, remaining) == [[1], [49]]
    assert recorder.batches == [[1], [7]]
    assert batcher.counts.skipped == 3


async def test_a_failing_item_fails_only_its_own_request() -> None:
    recorder = Recorder()
    batcher = batcher_of(recorder)
    first = await start_blocked(recorder, batcher)
    good = [asyncio.create_task(batcher.submit([number, number + 1])) for number in (10, 14)]
    bad = asyncio.create_task(batcher.submit([FAILING, 12]))
    await asyncio.sleep(0)
    recorder.gate.set()
    assert await asyncio.gather(*good) == [[100, 121], [196, 225]]
    with pytest.raises(ValueError, match="thirteen"):
        await bad
    assert batcher.counts.failed == 1
    await first


async def test_a_wrong_number_of_results_is_an_error_not_a_hang() -> None:
    batcher = batcher_of(lambda numbers: numbers[1:])
    with pytest.raises(ValueError, match="zip"):
        await asyncio.wait_for(batcher.submit([1, 2, 3]), 10)
    assert await batcher_of(Recorder()).submit([2]) == [4]


class Clock:
    """Time that passes only in `work`, a millisecond per unit of cost."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def work(self, numbers: list[int]) -> Sequence[int]:
        self.seconds += sum(numbers) / 1000
        return numbers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("serving.batching.time", clock)
    return clock


async def test_requests_that_would_wait_too_long_are_refused_until_the_queue_shrinks(clock: Clock) -> None:
    batcher = batcher_of(clock.work, max_delay=0.8)
    assert batcher.delay == 0
    await batcher.submit([50])  # to measure the speed
    requests = [asyncio.create_task(batcher.submit([50] * 10)) for _ in range(4)]  # half a second each
    await asyncio.sleep(0)
    assert batcher.delay == pytest.approx(1)
    for refused in requests[2:]:
        with pytest.raises(BacklogError) as error:
            await refused
        assert error.value.excess == pytest.approx(0.2)
    assert await asyncio.gather(*requests[:2]) == [[50] * 10] * 2
    assert batcher.delay == 0
    assert await batcher.submit([1]) == [1]


async def test_only_the_share_of_a_large_request_in_a_turn_counts_as_delay(clock: Clock) -> None:
    batcher = batcher_of(clock.work, max_delay=1)
    await batcher.submit([5])
    large = asyncio.create_task(batcher.submit([5] * 1000))  # five seconds
    while batcher.waiting in (0, 1000):  # until its first turn has begun
        await asyncio.sleep(0)
    assert batcher.delay == pytest.approx(0.005 * (ITEMS_PER_REQUEST + BATCHES_PER_TURN * 100 / 5))
    assert await batcher.submit([3]) == [3]
    assert not large.done()
    large.cancel()
