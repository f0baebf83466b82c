"""The rows of a `TrainingOrder` for the training workers, read and decoded on the cluster's free CPUs."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ExecutionResources
from torch import Tensor

from longclip.errors import DataError
from pipelines.common.cluster import data_context
from pipelines.common.model_inputs import ModelInputs
from pipelines.common.parquet_set import ParquetSet, arrow_filesystem
from pipelines.common.storage import explained
from pipelines.training.row_order import TrainingOrder, Window

DECODE_ROWS = 64
"""Rows that are decoded and passed on together."""
READERS = 4
"""Row groups of a window that are read concurrently: object storage has a high latency, but serves many requests."""
MAX_TASKS = 4000
"""Maximum number of Ray tasks of a run; with more windows, a task reads several."""
POSITION = "_position"
"""Column that the `ModelInputs` of a `WindowReader` must keep."""


class WindowReader:
    """Reads windows, given by number, as the rows that one worker trains on, in the order of its steps.

    A row that cannot be used is quarantined and replaced by the row a step later. All other rows stay in their steps,
    and no worker runs out of rows before the others.
    """

    def __init__(
        self,
        data: ParquetSet,
        order: TrainingOrder,
        inputs: ModelInputs,
        columns: Sequence[str],
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        """
        Args:
            data: files of the rows.
            order: the rows of every step.
            inputs: turns rows into inputs of the model.
            columns: columns to read.
            worker: number of the worker that gets the rows, from 0.
            workers: number of workers.
        """
        self.root, self.order, self.inputs, self.columns = data.root, order, inputs, list(columns)
        self.worker, self.workers = worker, workers
        self.row_groups = [(file.path, group) for file in data.files for group in range(len(file.row_groups))]

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Rows of the steps `first [n]` <= step < `end [n]` of windows `window [n]`, `DECODE_ROWS` at a time."""
        for number, first, end in zip(*(batch[name].tolist() for name in ("window", "first", "end")), strict=True):
            window = self.order.window(number, self.worker, self.workers)
            rows = _Rows(window, self._tables(window))
            stop = end * window.step_rows
            for start in range(first * window.step_rows, stop, DECODE_ROWS):
                yield self._decoded(rows, np.arange(start, min(start + DECODE_ROWS, stop)))

    def _tables(self, window: Window) -> dict[int, pa.Table]:
        groups = np.unique(window.groups).tolist()
        with explained("input", self.root), ThreadPoolExecutor(READERS) as pool:
            return dict(zip(groups, pool.map(self._table, groups), strict=True))

    def _table(self, group: int) -> pa.Table:
        path, index = self.row_groups[group]
        with pq.ParquetFile(path.path, filesystem=arrow_filesystem(path)) as file:
            return file.read_row_group(index, self.columns, use_threads=False)

    def _decoded(self, rows: "_Rows", positions: np.ndarray) -> dict[str, np.ndarray]:
        """Model inputs of the rows at some positions of a window, or of their substitutes."""
        parts: list[dict[str, np.ndarray]] = []
        missing = np.arange(len(positions))
        for attempt in range(len(rows)):
            sources = rows.window.substitutes(positions[missing], attempt)
            part = self.inputs(rows.cells(sources) | {POSITION: missing})
            parts.append(part)
            missing = np.setdiff1d(missing, part[POSITION])
            if not len(missing):
                break
        else:
            raise DataError(f"input='{self.root}': all {len(rows)} rows of a window are unreadable")
        order = np.argsort(np.concatenate([part.pop(POSITION) for part in parts]))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


class _Rows:
    """The raw rows of a window."""

    def __init__(self, window: Window, tables: dict[int, pa.Table]) -> None:
        self.window, self.tables = window, tables

    def __len__(self) -> int:
        return len(self.window.rows)

    def cells(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Cells of the rows at some positions of the window, by column."""
        rows = [(self.tables[int(self.window.groups[at])], int(self.window.rows[at])) for at in positions]
        cells: dict[str, np.ndarray] = {}
        for name in rows[0][0].column_names:
            cells[name] = np.empty(len(rows), dtype=object)
            for slot, (table, row) in enumerate(rows):  # one by one: numpy would take lists for further dimensions
                cells[name][slot] = table[name][row].as_py()
        return cells


def feed(
    reader: WindowReader, steps: range, batch_size: int, cpus: float, object_store_memory: float
) -> Iterator[dict[str, Tensor]]:
    """A worker's rows of some steps, in their order.

    Args:
        reader: reads the worker's rows.
        steps: steps to feed; earlier windows are not read.
        batch_size: rows per yielded batch.
        cpus: logical CPUs for reading and decoding.
        object_store_memory: maximum number of bytes of rows in flight.
    """
    windows = reader.order.windows(steps)
    if not windows:
        return
    context = data_context()
    # The worker must get its rows in their order, whichever task finishes first.
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=max(1.0, cpus), object_store_memory=object_store_memory
    )
    dataset = ray.data.from_items(windows, override_num_blocks=min(len(windows), MAX_TASKS))
    yield from dataset.map_batches(reader, batch_size=1).iter_torch_batches(
        batch_size=batch_size, prefetch_batches=2, device="cpu"
    )
