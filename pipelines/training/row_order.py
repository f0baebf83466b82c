"""Which rows each step of training sees.

The order is arithmetic on a seed, the rows of the row groups and the size of the global batch. It does not depend on
how many workers there are or how fast they read, so a run goes on at any step, with any number of workers, as if
nothing had happened.

An epoch puts the row groups in a random order and cuts the rows in that order into `streams` of equal length. A stream
is shuffled within windows of consecutive rows, which is what a reader holds at once. A global batch takes equally many
rows of every stream, and a worker reads the streams that are its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows that one worker reads at once, in the order of its steps."""

    epoch: int
    steps: int
    groups: np.ndarray
    """`[n]` row group of each row, a number among those of all files."""
    rows: np.ndarray
    """`[n]` its place in the row group."""
    share: int
    """Rows of each stream in a step; rows lie by step, then by stream."""

    @property
    def step_rows(self) -> int:
        """Rows of a step."""
        return len(self.rows) // self.steps

    def stand_ins(self, places: np.ndarray, attempt: int) -> np.ndarray:
        """Places `[m]` of rows that may stand in for those at `places [m]`, others in each attempt, 0 for themselves.

        They lie in the same stream, a step later: they are the same on any number of workers.
        """
        step, rest = np.divmod(places, self.step_rows)
        stream, slot = np.divmod(rest, self.share)
        moved = (step * self.share + slot + attempt * (self.share + 1)) % (self.steps * self.share)
        step, slot = np.divmod(moved, self.share)
        return step * self.step_rows + stream * self.share + slot


@dataclass(frozen=True)
class TrainingOrder:
    """The rows of every step.

    Each epoch leaves out what does not fill a global batch: `rows % global_batch_size` rows, others in each epoch.
    """

    row_groups: tuple[int, ...]
    """Rows of each row group."""
    global_batch_size: int
    streams: int
    """Divides the global batch size; a multiple of the number of workers."""
    window_rows: int
    """Rows of a stream that are read and shuffled together, rounded up to its part of whole global batches."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return sum(self.row_groups) // self.global_batch_size

    @property
    def steps_per_window(self) -> int:
        """Steps of each window but the last of an epoch."""
        return min(self.steps_per_epoch, -(-self.window_rows * self.streams // self.global_batch_size))

    @property
    def windows_per_epoch(self) -> int:
        """Windows of an epoch."""
        return -(-self.steps_per_epoch // self.steps_per_window)

    def windows(self, steps: range) -> list[dict[str, int]]:
        """The windows that some steps lie in: `window`, counted over all epochs, and in it the steps from `first` to
        before `end`."""
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
        """What one of the workers reads for a window.

        Args:
            number: window, counted over all epochs.
            worker: number of the worker, from 0.
            workers: number of workers; divides `streams`.
        """
        epoch, window = divmod(number, self.windows_per_epoch)
        first = window * self.steps_per_window
        steps = min(self.steps_per_window, self.steps_per_epoch - first)
        share = self.global_batch_size // self.streams  # rows of a stream in a step
        own = self.streams // workers
        positions = np.empty((steps, own, share), np.int64)
        for slot, stream in enumerate(range(worker * own, (worker + 1) * own)):
            start = (stream * self.steps_per_epoch + first) * share
            shuffled = np.random.default_rng([self.seed, epoch, stream, window]).permutation(steps * share)
            positions[:, slot] = (start + shuffled).reshape(steps, share)
        order, ends = _epoch(self.row_groups, self.seed, epoch)
        flat = positions.ravel()
        which = np.searchsorted(ends, flat, side="right")
        starts = ends[which] - np.asarray(self.row_groups)[order[which]]
        return Window(epoch, steps, order[which], flat - starts, share)


@lru_cache(maxsize=2)
def _epoch(row_groups: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Row groups in the order of an epoch, and where each of them ends."""
    order = np.random.default_rng([seed, epoch]).permutation(len(row_groups))
    return order, np.cumsum(np.asarray(row_groups)[order])
