"""Study what each part of the Long-CLIP method contributes, on models trained here.

    python pipelines/study.py --config pipelines/configs/study_reduced.yaml      # minutes
    python pipelines/study.py                                                    # an hour on one or two cores
    python pipelines/study.py --set input=/data/collages-train --set base_input=/data/photos-train \\
        --set 'tests={long: {input: /data/collages-test}, short: {input: /data/photos-val}}'

Trains one base CLIP per seed on short captions, and fine-tunes each in four ways: with plainly interpolated positions
(direct), with the knowledge-preserving stretch (kps), with primary component matching (pcm), and with both (both). The
base itself is the fifth arm (none). Then, with both, it varies the weight of the summary loss, the summaries, and the
number of components. All models answer the same long and short queries, and are compared query by query.

Without `input` it draws synthetic scenes. Everything runs in one Ray session. The same command resumes a stopped study,
and the report is written after each stage. Writes cells/NAME/ (results.json and the rank of every query) and report/
(report.md, report.json, one plot per stage).
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from longclip.files import whole_directory
from pipelines.common.cluster import connect
from pipelines.common.entry import run_entry
from pipelines.common.progress import Progress
from pipelines.common.run_directory import claim_directory
from pipelines.common.settings import load_settings
from pipelines.common.storage import storage_path
from pipelines.experiments.cells import Cell, stages
from pipelines.experiments.steps import run_step
from pipelines.experiments.study_report import StudyReport, stage_plot, stage_result
from pipelines.experiments.study_settings import StudySettings
from pipelines.experiments.study_steps import StudySteps
from pipelines.training.settings import DATA_CPUS

REPORT = "report"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(StudySettings, __doc__ or "", argv)
    progress = Progress("study")
    directory = Path(storage_path("output", settings.output))
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


if __name__ == "__main__":
    run_entry(main)
