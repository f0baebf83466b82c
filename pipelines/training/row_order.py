"""Which rows each step of training sees.

The order is computed from a seed, the sizes of the row groups and the global batch size. It does not depend on the
number of workers or their speed, so a run can resume at any step with any number of workers and sees the same batches.

An epoch puts the row groups in a random order and cuts the rows in that order into `streams` of equal length. A stream
is shuffled within windows of consecutive rows; a reader holds one window in memory. A global batch takes the same
number of rows from every stream, and each worker reads its share of the streams.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows that one worker reads together, in the order of its steps."""

    epoch: int
    steps: int
    groups: np.ndarray
    """`[n]` row group of each row, counted over all files."""
    rows: np.ndarray
    """`[n]` position of each row in its row group."""
    share: int
    """Rows of each stream in a step. Rows are sorted by step, then by stream."""

    @property
    def step_rows(self) -> int:
        """Rows of a step on this worker."""
        return len(self.rows) // self.steps

    def substitutes(self, positions: np.ndarray, attempt: int) -> np.ndarray:
        """Positions `[m]` of rows to use instead of those at `positions [m]`. Attempt 0 gives the rows themselves;
        each further attempt gives other rows.

        A substitute comes from the same stream, a step later, so it is the same for any number of workers.
        """
        step, rest = np.divmod(positions, self.step_rows)
        stream, slot = np.divmod(rest, self.share)
        moved = (step * self.share + slot + attempt * (self.share + 1)) % (self.steps * self.share)
        step, slot = np.divmod(moved, self.share)
        return step * self.step_rows + stream * self.share + slot


@dataclass(frozen=True)
class TrainingOrder:
    """The rows of every step.

    Each epoch leaves out the rows that do not fill a global batch: `rows % global_batch_size`, others in each epoch.
    """

    row_groups: tuple[int, ...]
    """Rows of each row group."""
    global_batch_size: int
    streams: int
    """Divides the global batch size; a multiple of the number of workers."""
    window_rows: int
    """Rows of a stream that are read and shuffled together, rounded up to a whole number of steps."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return sum(self.row_groups) // self.global_batch_size

    @property
    def steps_per_window(self) -> int:
        """Steps of each window, except that the last one of an epoch may be shorter."""
        return min(self.steps_per_epoch, -(-self.window_rows * self.streams // self.global_batch_size))

    @property
    def windows_per_epoch(self) -> int:
        """Windows of an epoch."""
        return -(-self.steps_per_epoch // self.steps_per_window)

    def windows(self, steps: range) -> list[dict[str, int]]:
        """The windows that cover some steps: `window`, counted over all epochs, and its steps `first` to `end`,
        exclusive."""
        windows = []
        step = steps.start
        while step < steps.stop:
            epoch, within = divmod(step, self.steps_per_epoch)
            window, first = divmod(within, self.steps_per_window)
            end = min(
                self.steps_per_window, self.steps_per_epoch - window * self.steps_per_window, first + steps.stop - step
            )
            windows.append({"window": epoch * self.windows_per_epoch + window, "first": first, "end": end})
            step += end - first
        return windows

    def window(self, number: int, worker: int, workers: int) -> Window:
        """The rows that one worker reads for a window.

        Args:
            number: window, counted over all epochs.
            worker: number of the worker, from 0.
            workers: number of workers; divides `streams`.
        """
        epoch, window = divmod(number, self.windows_per_epoch)
        first = window * self.steps_per_window
        steps = min(self.steps_per_window, self.steps_per_epoch - first)
        share = self.global_batch_size // self.streams  # rows of a stream in a step
        worker_streams = self.streams // workers
        positions = np.empty((steps, worker_streams, share), np.int64)
        for slot, stream in enumerate(range(worker * worker_streams, (worker + 1) * worker_streams)):
            start = (stream * self.steps_per_epoch + first) * share
            shuffled = np.random.default_rng([self.seed, epoch, stream, window]).permutation(steps * share)
            positions[:, slot] = (start + shuffled).reshape(steps, share)
        order, ends = _epoch(self.row_groups, self.seed, epoch)
        flat = positions.ravel()
        groups = np.searchsorted(ends, flat, side="right")  # as numbers in the order of the epoch
        starts = ends[groups] - np.asarray(self.row_groups)[order[groups]]
        return Window(epoch, steps, order[groups], flat - starts, share)


@lru_cache(maxsize=2)
def _epoch(row_groups: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Row groups in the order of an epoch, and the position in that order where each one ends."""
    order = np.random.default_rng([seed, epoch]).permutation(len(row_groups))
    return order, np.cumsum(np.asarray(row_groups)[order])
