"""The rows of each step, for any number of workers and from any first step."""

import numpy as np
import pytest

from pipelines.training.row_order import TrainingOrder

GROUPS = (*[128] * 9, 50, 3, 1)
BATCH, STREAMS = 96, 12

Row = tuple[int, int]


def order(**changes: object) -> TrainingOrder:
    values = {"row_groups": GROUPS, "global_batch_size": BATCH, "streams": STREAMS, "window_rows": 20, "seed": 3}
    return TrainingOrder(**(values | changes))  # type: ignore[arg-type]


def steps_of(order: TrainingOrder, steps: range, worker: int = 0, workers: int = 1) -> list[list[Row]]:
    """The rows that one worker gets in each step."""
    rows_by_step = []
    for part in order.windows(steps):
        window = order.window(part["window"], worker, workers)
        rows = list(zip(window.groups.tolist(), window.rows.tolist(), strict=True))
        size = len(rows) // window.steps
        rows_by_step += [rows[step * size : (step + 1) * size] for step in range(part["first"], part["end"])]
    return rows_by_step


def test_an_epoch_has_every_row_once_except_a_tail_that_changes() -> None:
    training = order()
    rows, epoch_steps = sum(GROUPS), training.steps_per_epoch
    assert epoch_steps == rows // BATCH
    tails = []
    for epoch in range(3):
        steps = steps_of(training, range(epoch * epoch_steps, (epoch + 1) * epoch_steps))
        seen = [row for step in steps for row in step]
        assert len(steps) == epoch_steps
        assert len(seen) == len(set(seen)) == epoch_steps * BATCH
        assert all(place < GROUPS[group] for group, place in seen)
        everything = {(group, place) for group, size in enumerate(GROUPS) for place in range(size)}
        tails.append(everything - set(seen))
    assert len(tails[0]) == rows % BATCH
    assert tails[0] != tails[1] != tails[2]


@pytest.mark.parametrize("workers", [2, 3, 4, 12])
def test_a_global_batch_is_the_same_for_any_number_of_workers(workers: int) -> None:
    steps = range(5, 30)
    one_worker = steps_of(order(), steps)
    parts = [steps_of(order(), steps, worker, workers) for worker in range(workers)]
    for step, expected in enumerate(one_worker):
        shares = [part[step] for part in parts]
        assert {len(share) for share in shares} == {BATCH // workers}
        assert [row for share in shares for row in share] == expected


def test_a_resumed_run_has_the_steps_of_an_uninterrupted_one() -> None:
    everything = steps_of(order(), range(40))
    for first in (1, 3, 11, 12, 13, 26, 39):
        assert steps_of(order(), range(first, 40), 1, 2) == steps_of(order(), range(40), 1, 2)[first:]
        assert steps_of(order(), range(first, 40)) == everything[first:]


def test_a_window_reads_neighbouring_row_groups_and_mixes_them() -> None:
    training = order(row_groups=(64,) * 64, streams=4, global_batch_size=64, window_rows=256)
    window = training.window(0, worker=1, workers=4)
    assert len(window.rows) == 1024 // 4
    assert len(np.unique(window.groups)) <= 1024 // 4 // 64 + 1, "a worker reads whole row groups once"
    first_step = window.groups[: len(window.groups) // window.steps]
    assert len(np.unique(first_step)) >= 3, "rows of a step come from the whole window"


def test_seed_and_epoch_change_the_order() -> None:
    first, other = steps_of(order(), range(12)), steps_of(order(seed=4), range(12))
    assert first != other
    assert steps_of(order(), range(12, 24)) != first
    assert steps_of(order(), range(12)) == first


def test_a_set_smaller_than_a_window_is_one_window() -> None:
    small = order(row_groups=(30, 70), window_rows=10_000)
    assert (small.steps_per_epoch, small.steps_per_window, small.windows_per_epoch) == (1, 1, 1)
    assert len(small.windows(range(5))) == 5
    assert small.windows(range(5, 5)) == []
