"""The job of `benchmark.py`: measure all models on all tasks, and write the report.

Each model on each task is one measurement, which is kept when it is finished: a run that was killed continues after the
last one, and a run with another model or task measures only what is new.
"""

import json
from functools import partial
from typing import Any

from upath import UPath

from pipelines.common.events import report
from pipelines.common.progress import Progress, export_pieces
from pipelines.common.rejected_rows import QUARANTINE, write_quarantine
from pipelines.common.settings import dump
from pipelines.common.storage import local_path
from pipelines.evaluation.benchmark_output import (
    MEASURED,
    RANKS,
    REPORT,
    REPORT_PAGE,
    RESULTS,
    SCORES,
    BenchmarkOutput,
    claim_output,
)
from pipelines.evaluation.measure_job import MeasureJob, measure_job
from pipelines.evaluation.measured import Measured, write_ranks
from pipelines.evaluation.measurements import Measurements, data_digest, measurement_key
from pipelines.evaluation.report import progress_table, render_html, render_markdown
from pipelines.evaluation.results import flat_figures, task_result
from pipelines.evaluation.scores import write_scores
from pipelines.evaluation.settings import BenchmarkSettings
from pipelines.evaluation.tasks import Task
from pipelines.registry.model_cache import model_digest


def benchmark(settings: BenchmarkSettings) -> None:
    """Measure what is not measured yet, and print the report.

    Raises:
        CheckpointError: a model cannot be read.
        ConfigError: the output exists and is not a benchmark's, or another benchmark is writing to it.
        DataError: a task cannot be read, or too many of its rows are unusable.
    """
    progress = Progress("benchmark")
    path = local_path("output", settings.output)
    with claim_output(path) as output, measure_job(settings, path.parent, output.scratch) as job:
        work = _Benchmark(settings, job, output)
        work.run()
        rows, rejected = work.rows()
    print(f"\n{(path / REPORT).read_text()}")
    progress.summary(rows, rows - len(rejected), len(rejected), f"results in {path}")


class _Benchmark:
    """Measurements of all models on all tasks, and the files made of them."""

    def __init__(self, settings: BenchmarkSettings, job: MeasureJob, output: BenchmarkOutput) -> None:
        self.settings, self.job, self.output = settings, job, output
        self.finished = Measurements(output.path / MEASURED, settings.max_rejected_fraction)
        self.measured: dict[str, dict[str, Measured]] = {task.name: {} for task in job.tasks}
        self.results: dict[str, dict[str, Any]] = {}
        base = settings.base or next(iter(settings.models))
        # The base first: without it, there is nothing to compare the others with.
        self.models = [base, *(name for name in settings.models if name != base)]
        self.of = len(job.tasks) * len(self.models)

    @property
    def done(self) -> int:
        """Number of finished measurements."""
        return sum(map(len, self.measured.values()))

    def run(self) -> None:
        """Measure what is missing, and write the results after each measurement."""
        activations = self.settings.activations
        sources = {name: self.job.model(self.settings.models[name], activations.get(name)) for name in self.models}
        keys = self._keys(sources)
        self._take_finished(keys)
        export_pieces("benchmark", "measure", self.done, self.of)
        for task in self.job.tasks:
            for name in self.models:
                if name not in self.measured[task.name]:
                    self._measure(task, name, sources[name], keys[task.name, name])
        in_order = [self.results[task.name] for task in self.job.tasks]  # whatever a killed run did first
        results = {"settings": dump(self.settings), "results": flat_figures(in_order)}
        self.output.put_text(RESULTS, json.dumps(results, indent=2) + "\n")

    def rows(self) -> tuple[int, dict[str, str]]:
        """Number of rows of all tasks, and the rejected ones with their reasons."""
        rejected: dict[str, str] = {}
        rows = 0
        for measured in self.measured.values():
            reasons = {row: reason for model in measured.values() for row, reason in model.rejected.items()}
            rows += next((model.images for model in measured.values()), 0) + len(reasons)
            rejected |= reasons
        return rows, rejected

    def _keys(self, sources: dict[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
        settings = self.settings
        digests = {name: model_digest(source) for name, source in sources.items()}
        also = {"long_text": settings.long_text, "perturbation_draws": settings.perturbation_draws}
        keys = {}
        for task in self.job.tasks:
            own = settings.tasks[task.name]
            field = f"tasks.{task.name}.input"
            data = data_digest(field, own.input, task.source, settings.storage, self.output.path)
            for name in self.models:
                keys[task.name, name] = measurement_key(digests[name], task, data, own, also)
        return keys

    def _take_finished(self, keys: dict[tuple[str, str], dict[str, Any]]) -> None:
        """Use the finished measurements again that fit, and write their results."""
        tasks, models = self.measured, self.settings.models
        for task in self.job.tasks:
            for name in self.models:
                if measured := self.finished.read(task.name, name, keys[task.name, name]):
                    tasks[task.name][name] = measured
                    self._write_tables(task, name)
        tables = {f"{task}.{model}.parquet" for task, measured in tasks.items() for model in measured}
        self.output.remove_all_but({f"{task}.json" for task, measured in tasks.items() if measured}, tables)
        if self.done:
            parts = [f"{task} ({', '.join(measured)})" for task, measured in tasks.items() if measured]
            report(f"benchmark: {self.done} of {self.of} measurements were made before: {', '.join(parts)}")
        if others := self.finished.others(tasks, models):
            report(f"benchmark: {len(others)} measurements of other tasks or models stay in {self.finished.folder}")
        for task in self.job.tasks:
            if tasks[task.name]:
                self._summarize(task)
        self._write_report()

    def _measure(self, task: Task, name: str, source: str, key: dict[str, Any]) -> None:
        report(
            f"benchmark: {self.done} of {self.of} measurements are done; next is {task.name} with {name}"
            f" ({self.settings.models[name]})"
        )
        measured = self.job.measure(source, task, self.settings.long_text, self.settings.perturbation_draws)
        self.measured[task.name][name] = measured
        place = self.finished.path(task.name, name).relative_to(self.output.path)
        self.output.put(str(place), lambda path: self.finished.write(measured, key, path))
        self._write_tables(task, name)
        self._summarize(task)
        self._write_report()
        export_pieces("benchmark", "measure", self.done, self.of)

    def _write_tables(self, task: Task, name: str) -> None:
        """Write the ranks and scores of a model on a task."""
        measured = self.measured[task.name][name]
        self.output.put(f"{RANKS}/{task.name}.{name}.parquet", partial(write_ranks, measured))
        self.output.put(f"{SCORES}/{task.name}.{name}.parquet", partial(write_scores, measured.scores))

    def _summarize(self, task: Task) -> None:
        """Write the result of a task, as far as it is measured."""
        settings, finished = self.settings, self.measured[task.name]
        measured = {name: finished[name] for name in settings.models if name in finished}
        result = task_result(
            task, measured, settings.models, self.models[0], settings.paper_figures, settings.equal_margin
        )
        self.results[task.name] = result
        missing = len(self.models) - len(measured)
        unfinished = {"unfinished": f"{len(measured)} of {len(self.models)} models"} if missing else {}
        self.output.put_text(f"{task.name}.json", json.dumps(unfinished | result, indent=2) + "\n")

    def _write_report(self) -> None:
        """Write what is measured so far, and what is missing."""
        results = [self.results[name] for name in self.measured if name in self.results]
        missing = progress_table(self.measured, self.settings.models) if self.done < self.of else None
        if results:
            self.output.put_text(REPORT, render_markdown("Benchmark", results, missing))
            self.output.put_text(REPORT_PAGE, render_html("Benchmark", results, missing))
        _, rejected = self.rows()
        places = ", ".join(task.input for task in self.settings.tasks.values())
        self.output.put(QUARANTINE, lambda path: write_quarantine(rejected, places, "benchmark", UPath(path)))
