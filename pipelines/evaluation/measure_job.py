"""What jobs that measure models share: their settings, the tasks they find, and where models come from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from upath import UPath

from pipelines.common.cluster import connect
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage, storage_path
from pipelines.common.workers import Workers
from pipelines.evaluation.measured import Measured
from pipelines.evaluation.measuring import measure
from pipelines.evaluation.tasks import Task, TaskSettings, open_task
from pipelines.registry.model_cache import local_model
from pipelines.registry.server import tracking_uri


class MeasureSettings(Settings):
    """What every job that measures needs to know."""

    tasks: dict[str, TaskSettings] = Field(min_length=1)
    """What to measure, by name. Each has `input`, and may have protocol, kind (retrieval, zero_shot), text (long,
    short), classes, templates (simple, openai), source (as for prepare) and subset."""
    storage: Storage = Storage()
    workers: Workers = Workers()
    max_rejected_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of rows that may be unusable. 0 by default: fewer candidates would flatter the figures."""
    cache: str = "~/.cache/longclip/models"
    """Directory for downloaded and converted models; on a cluster, one that all nodes see."""


class MeasureJob:
    """Tasks that were found, and measurements of models on them."""

    def __init__(self, settings: MeasureSettings, tasks: list[Task], scratch: Path, tracking_uri: str) -> None:
        self.settings, self.tasks, self.scratch, self.tracking_uri = settings, tasks, scratch, tracking_uri

    def model(self, source: str) -> str:
        """What `load_checkpoint` takes, of any way of naming a model (see `local_model`)."""
        return local_model(source, Path(storage_path("cache", self.settings.cache)), self.tracking_uri)

    def measure(self, model: str, task: Task, long_text: bool = False) -> Measured:
        """A model, as `self.model` names it, on a task."""
        settings, scratch = self.settings, self.scratch / task.name
        scratch.mkdir(exist_ok=True)
        return measure(model, task, UPath(scratch), settings.max_rejected_fraction, settings.workers, long_text)


@contextmanager
def measure_job(settings: MeasureSettings, directory: Path) -> Iterator[MeasureJob]:
    """Find all tasks before anything is computed, and connect to Ray.

    Args:
        settings: what to measure.
        directory: local directory of the outputs; scratch files are made there and removed, and MLflow's database is
            looked for there without `MLFLOW_TRACKING_URI`.
    """
    tasks = [open_task(name, task, settings.storage) for name, task in settings.tasks.items()]
    connect(settings.workers.total_cpus + 2)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measure.", dir=directory) as scratch:
        yield MeasureJob(settings, tasks, Path(scratch), tracking_uri(directory))
