"""The job of `benchmark.py`: measure all models on all tasks, and write the report."""

import json
from pathlib import Path
from typing import Any

from upath import UPath

from longclip.files import whole_directory
from pipelines.common.events import report
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import QUARANTINE, write_quarantine
from pipelines.common.run_directory import refuse_other_output
from pipelines.common.settings import dump
from pipelines.common.storage import local_path
from pipelines.evaluation.measure_job import MeasureJob, measure_job
from pipelines.evaluation.measured import write_ranks
from pipelines.evaluation.report import render_html, render_markdown
from pipelines.evaluation.results import flat_figures, task_result
from pipelines.evaluation.settings import BenchmarkSettings

RESULTS, REPORT = "results.json", "report.md"


def benchmark(settings: BenchmarkSettings) -> None:
    """Measure the models and print the report.

    Raises:
        CheckpointError: a model cannot be read.
        ConfigError: the output exists and is not a benchmark's.
        DataError: a task cannot be read, or too many of its rows are unusable.
    """
    progress = Progress("benchmark")
    output = local_path("output", settings.output)
    refuse_other_output("output", output, lambda directory: (directory / RESULTS).is_file())
    with measure_job(settings, output.parent) as job, whole_directory(output) as aside:
        results, rows, rejected = _measure_all(settings, job, aside)
        figures = {"settings": dump(settings), "results": flat_figures(results)}
        (aside / RESULTS).write_text(json.dumps(figures, indent=2) + "\n")
        (aside / REPORT).write_text(render_markdown("Benchmark", results))
        (aside / "report.html").write_text(render_html("Benchmark", results))
        places = ", ".join(task.input for task in settings.tasks.values())
        write_quarantine(rejected, places, "benchmark", UPath(aside / QUARANTINE))
    print(f"\n{(output / REPORT).read_text()}")
    progress.summary(rows, rows - len(rejected), len(rejected), f"results in {output}")


def _measure_all(
    settings: BenchmarkSettings, job: MeasureJob, output: Path
) -> tuple[list[dict[str, Any]], int, dict[str, str]]:
    """Results of all tasks, number of rows, and rejected rows; writes one JSON per task, and ranks, to `output`."""
    models = {name: job.model(source, settings.activations.get(name)) for name, source in settings.models.items()}
    base = settings.base or next(iter(models))
    results: list[dict[str, Any]] = []
    rejected: dict[str, str] = {}
    rows = 0
    for task in job.tasks:
        measured = {}
        for name, model in models.items():
            report(f"embedding with {name} ({settings.models[name]}): {task.name}")
            measured[name] = job.measure(model, task, settings.long_text, settings.perturbation_draws)
            write_ranks(measured[name], output / "ranks" / f"{task.name}.{name}.parquet")
        reasons = {row: reason for model_rows in measured.values() for row, reason in model_rows.rejected.items()}
        rows += next(iter(measured.values())).images + len(reasons)
        rejected |= reasons
        figures = settings.paper_figures
        results.append(task_result(task, measured, settings.models, base, figures, settings.equal_margin))
        (output / f"{task.name}.json").write_text(json.dumps(results[-1], indent=2) + "\n")
    return results, rows, rejected
