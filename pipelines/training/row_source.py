"""The rows that a run trains and validates on, and how a worker gets its part of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import ray
from torch import Tensor

from longclip.errors import ConfigError, DataError
from longclip.training.distributed import rank, world_size
from pipelines.common.model_inputs import ModelInputs
from pipelines.common.parquet_set import ParquetSet, manifest_of, open_parquet
from pipelines.common.storage import existing_path
from pipelines.training.row_feed import WindowReader, feed
from pipelines.training.row_order import TrainingOrder
from pipelines.training.settings import FinetuneSettings

OBJECT_STORE_SHARE = 0.4
"""Share of the object store for rows on their way to the workers."""

VALIDATION_WINDOW_ROWS = 256
MAX_READS_PER_EPOCH = 3
"""Above this, a warning says how often each row group is read."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set in the order of training steps."""

    data: ParquetSet
    columns: list[str]
    order: TrainingOrder
    steps: int


@dataclass(frozen=True)
class Source:
    """Rows, and how they become inputs of the model."""

    rows: Rows
    inputs: ModelInputs

    def batches(self, steps: range, batch_size: int, worker_cpus: int) -> Iterator[dict[str, Tensor]]:
        """This worker's part of some steps, `batch_size` rows at a time.

        They are read and decoded with this worker's share of the cluster's object store and of the CPUs that the
        `worker_cpus` of each training worker leave free.
        """
        cluster = ray.cluster_resources()
        reader = WindowReader(self.rows.data, self.rows.order, self.inputs, self.rows.columns, rank(), world_size())
        cpus = cluster["CPU"] / world_size() - worker_cpus
        memory = OBJECT_STORE_SHARE * cluster["object_store_memory"] / world_size()
        return feed(reader, steps, batch_size, cpus, memory)


def training_rows(settings: FinetuneSettings) -> Rows:
    """The rows of `input` in all steps.

    Raises:
        DataError: they cannot be read, or there are fewer than one global batch.
    """
    columns = _columns(settings)
    data = open_parquet("input", settings.input, settings.storage, columns, split="train")
    order = TrainingOrder(
        data.row_groups, settings.global_batch_size, settings.streams, settings.data.shuffle_window, settings.seed
    )
    if order.steps_per_epoch == 0:
        raise DataError(
            f"input='{data.root}' has {data.rows} rows, fewer than one global batch of"
            f" {settings.global_batch_size} ({settings.workers.count} workers x"
            f" optim.per_worker_batch_size={settings.optim.per_worker_batch_size}); give more rows or a smaller batch"
        )
    window = order.steps_per_window * settings.global_batch_size // settings.streams
    reads = max(data.row_groups) / window
    if reads > MAX_READS_PER_EPOCH and order.windows_per_epoch > 1:
        print(
            f"warning: input='{data.root}' has row groups of {max(data.row_groups)} rows; each is read about"
            f" {reads:.0f} times per epoch. Rewrite the data with prepare.py, or raise data.shuffle_window",
            flush=True,
        )
    return Rows(data, columns, order, order.steps_per_epoch * settings.optim.epochs)


def validation_rows(settings: FinetuneSettings) -> Rows | None:
    """The rows to validate on, the same at every checkpoint and for any number of workers; None if there are none.

    Raises:
        DataError: `validation.input` cannot be read, or has fewer rows than `data.streams`.
        ConfigError: the settings ask for the best checkpoint, but there are no rows to validate on.
    """
    data = _validation_set(settings) if settings.validation.rows else None
    if data is None:
        if settings.checkpoints.publish == "best":
            raise ConfigError(
                "checkpoints.publish=best needs rows to validate on: set validation.input, or use an input with a split"
                " 'val' and validation.rows above 0; or set checkpoints.publish=last"
            )
        return None
    steps = min(settings.validation.rows, data.rows) // settings.streams
    if not steps:
        raise DataError(
            f"validation.input='{data.root}' or validation.rows={settings.validation.rows} has fewer rows than"
            f" data.streams={settings.streams}; give more rows, or set validation.rows=0"
        )
    order = TrainingOrder(data.row_groups, settings.streams, settings.streams, VALIDATION_WINDOW_ROWS, seed=0)
    return Rows(data, _columns(settings), order, steps)


def _validation_set(settings: FinetuneSettings) -> ParquetSet | None:
    columns, storage = _columns(settings), settings.storage
    if settings.validation.input:
        return open_parquet("validation.input", settings.validation.input, storage, columns, split="val")
    if not manifest_of(existing_path("input", settings.input, storage)).get("splits", {}).get("val"):
        return None
    return open_parquet("input", settings.input, storage, columns, split="val")


def _columns(settings: FinetuneSettings) -> list[str]:
    return [settings.columns.id, settings.columns.image, *settings.text_columns]
