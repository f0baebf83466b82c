"""The job of `study.py`: train and measure the cells of all stages, and write the report after each."""

import json
import time
from pathlib import Path

from longclip.files import whole_directory
from pipelines.common.cluster import connect
from pipelines.common.progress import Progress
from pipelines.common.run_directory import claim_directory
from pipelines.common.storage import local_path
from pipelines.experiments.cells import Cell, stages
from pipelines.experiments.steps import run_step
from pipelines.experiments.study_report import StudyReport, stage_plot, stage_result
from pipelines.experiments.study_settings import StudySettings
from pipelines.experiments.study_steps import StudySteps
from pipelines.training.settings import DATA_CPUS

REPORT = "report"


def study(settings: StudySettings) -> None:
    """Run the study, or what is left of it, and print its report.

    Raises:
        ConfigError: the output holds a study with other settings.
        LongClipError: a step failed.
    """
    progress = Progress("study")
    directory = local_path("output", settings.output)
    claim_directory("output", directory, settings, StudySettings.identity)
    connect(settings.workers.total_cpus + DATA_CPUS)
    plan = stages(
        settings.seeds,
        settings.varied_seeds,
        usual=(settings.weight, settings.strategy, settings.pca_dim),
        weights=settings.weights,
        strategies=settings.strategies,
        pca_dims=settings.pca_dims,
        combine=settings.combine,
    )
    steps = StudySteps(settings, directory)
    cells: set[Cell] = set()
    taken: set[str] = set()
    report = StudyReport([])
    for stage in plan:
        for step in steps.of_stage(stage):
            if step.command not in taken:
                run_step(f"[{stage.title}] {time.monotonic() - progress.started:.0f} s:", step, directory)
            taken.add(step.command)
        cells.update(stage.cells)
        report.stages.append(stage_result(stage, directory / "cells"))
        _write_report(report, directory / REPORT)
    print(f"\n{report.markdown()}")
    progress.summary(len(cells), len(cells), 0, f"models trained and measured; report in {directory / REPORT}")


def _write_report(report: StudyReport, directory: Path) -> None:
    with whole_directory(directory) as aside:
        (aside / "report.md").write_text(report.markdown())
        (aside / "report.json").write_text(json.dumps(report.asdict(), indent=2) + "\n")
        for result in report.stages:
            (aside / f"{result.slug}.svg").write_text(stage_plot(result))
