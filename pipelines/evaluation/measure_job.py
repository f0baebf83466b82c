"""What all jobs that measure models share: settings, opened tasks, and loading of models."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from pipelines.common.cluster import connect
from pipelines.common.storage import local_path
from pipelines.evaluation.measured import Measured
from pipelines.evaluation.measuring import measure
from pipelines.evaluation.settings import MeasureSettings
from pipelines.evaluation.tasks import Task, open_task
from pipelines.registry.model_cache import local_model
from pipelines.registry.server import tracking_uri


class MeasureJob:
    """Opened tasks, and measurements of models on them."""

    def __init__(
        self, settings: MeasureSettings, tasks: list[Task], scratch: Path, cache: Path, tracking_uri: str
    ) -> None:
        self.settings, self.tasks, self.scratch, self.tracking_uri = settings, tasks, scratch, tracking_uri
        self.cache = cache

    def model(self, source: str, activation: str | None = None) -> str:
        """Local directory of a model by any of its names (see `local_model`)."""
        return local_model(source, self.cache, self.tracking_uri, activation)

    def measure(self, model: str, task: Task, long_text: bool = False, draws: int = 1) -> Measured:
        """Measure a model, in a directory from `self.model`, on a task."""
        settings, scratch = self.settings, self.scratch / task.name
        scratch.mkdir(exist_ok=True)
        return measure(model, task, UPath(scratch), settings.max_rejected_fraction, settings.workers, long_text, draws)


@contextmanager
def measure_job(settings: MeasureSettings, directory: Path, scratch: Path | None = None) -> Iterator[MeasureJob]:
    """Open all tasks before anything is computed, and connect to Ray.

    Args:
        settings: tasks and how to measure.
        directory: local directory of the outputs, also for MLflow's database without `MLFLOW_TRACKING_URI`.
        scratch: local directory of temporary files; None for that of the outputs.
    """
    cache = local_path("cache", settings.cache)
    tasks = [open_task(name, task, settings.storage) for name, task in settings.tasks.items()]
    connect(settings.workers.total_cpus + 2)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measure.", dir=scratch or directory) as temporary:
        yield MeasureJob(settings, tasks, Path(temporary), cache, tracking_uri(directory))
