"""Measure and compare checkpoints on retrieval and zero-shot tasks.

    python pipelines/benchmark.py --set 'models={base: openai/clip-vit-base-patch16, tuned: /data/run1/checkpoint}' \\
        --set tasks.urban1k.input=/data/Urban1k --set tasks.cifar10.input=/data/cifar-10-binary.tar.gz \\
        --set 'tasks.mine={input: /data/test, source: {caption: caption}}' --set output=/data/bench

A task is a protocol by its name (coco5k, flickr30k-1k, flickr30k-full, sharegpt4v-1k, urban1k, docci, dci, iiw,
imagenet, imagenet-v2, imagenet-o, cifar10, cifar100; see protocols.yaml), or any data set of yours. A model is a
directory, a hub name, models:/name/version, models:/name@alias, or a file of official weights.

Writes report.html, report.md, results.json, one JSON per task, and the rank of every query in ranks/.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from upath import UPath

from longclip.files import whole_directory
from pipelines.common.entry import run_entry
from pipelines.common.events import report
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import QUARANTINE, write_quarantine
from pipelines.common.settings import dump, load_settings
from pipelines.common.storage import storage_path
from pipelines.evaluation.measure_job import MeasureJob, MeasureSettings, measure_job
from pipelines.evaluation.measured import write_ranks
from pipelines.evaluation.report import render_html, render_markdown
from pipelines.evaluation.results import flat_figures, paper_figures, task_result

RESULTS, REPORT = "results.json", "report.md"


class BenchmarkSettings(MeasureSettings):
    """Settings of a benchmark."""

    models: dict[str, str] = Field(min_length=1)
    """Models by their name in the report."""
    base: str | None = None
    """Model that the others are compared with, query by query; null for the first one."""
    paper_figures: dict[str, str] = Field(default={})
    """Models to compare with a paper's figures, by their name in paper_figures.yaml: `{official: long-clip-b16}`."""
    long_text: bool = True
    """On long texts, also measure recall by length, with perturbed texts, and against hard negatives."""
    output: str = "var/benchmark"
    """Local directory of the results; an existing one is replaced."""

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for field, names, known in (
            ("base", [self.base] if self.base else [], self.models),
            ("paper_figures", list(self.paper_figures), self.models),
            ("paper_figures", list(self.paper_figures.values()), paper_figures()),
        ):
            if wrong := [name for name in names if name not in known]:
                raise ValueError(f"{field} has '{wrong[0]}', which is unknown; known are {', '.join(known)}")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(BenchmarkSettings, __doc__ or "", argv)
    progress = Progress("benchmark")
    output = Path(storage_path("output", settings.output))
    with measure_job(settings, output.parent) as job, whole_directory(output) as aside:
        results, rows, rejected = measure_all(settings, job, aside)
        figures = {"settings": dump(settings), "results": flat_figures(results)}
        (aside / RESULTS).write_text(json.dumps(figures, indent=2) + "\n")
        (aside / REPORT).write_text(render_markdown("Benchmark", results))
        (aside / "report.html").write_text(render_html("Benchmark", results))
        places = ", ".join(task.input for task in settings.tasks.values())
        write_quarantine(rejected, places, "benchmark", UPath(aside / QUARANTINE))
    print(f"\n{(output / REPORT).read_text()}")
    progress.summary(rows, rows - len(rejected), len(rejected), f"results in {output}")


def measure_all(
    settings: BenchmarkSettings, job: MeasureJob, output: Path
) -> tuple[list[dict[str, Any]], int, dict[str, str]]:
    """Results of all tasks, number of rows, and rejected rows; writes one JSON per task, and ranks, to `output`."""
    models = {name: job.model(source) for name, source in settings.models.items()}
    base = settings.base or next(iter(models))
    results: list[dict[str, Any]] = []
    rejected: dict[str, str] = {}
    rows = 0
    for task in job.tasks:
        measured = {}
        for name, model in models.items():
            report(f"embedding with {name} ({settings.models[name]}): {task.name}")
            measured[name] = job.measure(model, task, settings.long_text)
            write_ranks(measured[name], output / "ranks" / f"{task.name}.{name}.parquet")
        reasons = {row: reason for model_rows in measured.values() for row, reason in model_rows.rejected.items()}
        rows += next(iter(measured.values())).images + len(reasons)
        rejected |= reasons
        results.append(task_result(task, measured, settings.models, base, settings.paper_figures))
        (output / f"{task.name}.json").write_text(json.dumps(results[-1], indent=2) + "\n")
    return results, rows, rejected


if __name__ == "__main__":
    run_entry(main)
