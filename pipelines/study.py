"""What each part of the method does: the study of the Long-CLIP paper, on models that are trained here.

Trains base CLIPs on short captions, one a seed, and from each of them: no fine-tuning (none), fine-tuning with plainly
interpolated positions (direct), with the knowledge-preserving stretch (kps), with primary component matching (pcm),
with both (both). Then, with both, it varies how much summaries weigh, how they are made, and the number of components.
All models answer the same long and short queries, and are compared query by query.

Everything runs in one Ray session, and is kept: the same command goes on where it was stopped, and the report holds the
stages that are complete.

    python pipelines/study.py --config pipelines/configs/study_reduced.yaml      # minutes
    python pipelines/study.py                                                    # an hour on one or two cores
    python pipelines/study.py --set input=/data/collages-train --set base_input=/data/photos-train \\
        --set 'tests={long: {input: /data/collages-test}, short: {input: /data/photos-val}}'

Without data it draws synthetic scenes. Writes cells/NAME/ (results.json and the rank of every query) and report/
(report.md, report.json, a plot of each stage).
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from longclip.files import whole_directory
from longclip.text.summaries import Strategy
from pipelines import benchmark, finetune, sample_data, summarize
from pipelines.common.entry import Progress, connect, run_entry
from pipelines.common.run_directory import claim_directory
from pipelines.common.settings import Settings, load_settings
from pipelines.common.storage import storage_path
from pipelines.common.workers import Workers
from pipelines.experiments.cells import ARMS, Cell, Stage, stages
from pipelines.experiments.steps import Step, run_step
from pipelines.experiments.study_report import StudyReport, stage_plot, stage_result

REPORT = "report"
PLANNED = ("seeds", "varied_seeds", "weight", "strategy", "pca_dim", "weights", "strategies", "pca_dims", "combine")
"""Settings that say which cells there are: names of cells tell them apart."""


class TestSet(Settings):
    """Texts to measure with."""

    input: str
    """Parquet file or directory with images and captions."""
    column: str = "caption"
    """Column of the captions."""


class StudySettings(Settings):
    """Everything that defines a study."""

    output: str = "var/study"
    """Local directory that everything is written to."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Of base models and of what is trained from them."""
    varied_seeds: list[int] = Field(default=[0], min_length=1)
    """Those of them with which weight, summaries and components are varied."""
    train_rows: PositiveInt = 2500
    """Synthetic scenes to train on, where no data is given."""
    test_rows: PositiveInt = 500
    """Synthetic scenes to search; every four of them differ only behind token 77 of their captions."""
    input: str | None = None
    """Long captions to fine-tune on, in a column `caption`; null draws synthetic scenes."""
    base_input: str | None = None
    """Short captions to train bases on, in a column `caption`; null takes the short captions of the scenes."""
    tests: dict[str, TestSet] = Field(default={})
    """What to measure with, by name; empty takes the long and the short captions of scenes."""
    base_epochs: PositiveInt = 5
    """Passes of a base model."""
    epochs: PositiveInt = 2
    """Passes of a fine-tuning."""
    learning_rate: PositiveFloat = 1e-3
    """Of every training. Models that are trained here in minutes bear much more than published ones do."""
    batch_size: PositiveInt = 64
    """Pairs per step and worker."""
    workers: Workers = Workers()
    """Training processes of a run."""
    bf16: bool = True
    """Train with bfloat16 autocast. Results are always measured in float32."""
    weight: PositiveFloat = 0.3
    """Weight of the summary loss, except where it is varied."""
    strategy: Strategy = "extractive"
    """How captions are summarized, except where it is varied."""
    pca_dim: PositiveInt = 32
    """Components, except where they are varied."""
    weights: list[float] = Field(default=[0.0, 0.1, 0.3, 1.0], min_length=1)
    """Weights to try; 0 is the arm without component matching."""
    strategies: list[Strategy] = Field(default=["extractive", "first_sentence", "drop_first"])
    """Summaries to try."""
    pca_dims: list[PositiveInt] = Field(default=[8, 16, 32])
    """Numbers of components to try."""
    combine: bool = False
    """Also train every combination of the three, not only one thing at a time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.input) != bool(self.tests) or bool(self.input) != bool(self.base_input):
            raise ValueError(
                "input, base_input and tests belong together; give all of them, or none for synthetic scenes"
            )
        if unknown := set(self.varied_seeds) - set(self.seeds):
            raise ValueError(f"varied_seeds has {min(unknown)}, which is not among seeds={self.seeds}")
        return self

    def identity(self) -> dict[str, Any]:
        """What every cell's result depends on, in addition to what the cell's name says."""
        return self.model_dump(mode="json", exclude={"output", *PLANNED})


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(StudySettings, __doc__ or "", argv)
    progress = Progress("study")
    directory = Path(storage_path("output", settings.output))
    claim_directory("output", directory, settings, StudySettings.identity)
    connect(settings.workers.total_cpus + finetune.DATA_CPUS)
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


class StudySteps:
    """The entries of a study with their settings; what cells share is done once."""

    def __init__(self, settings: StudySettings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        scenes, found = directory / "scenes-train", directory / "scenes-test"
        self.draw = [
            Step("draw scenes to train on", sample_data, rows=settings.train_rows, output=scenes),
            Step("draw scenes to search", sample_data, rows=settings.test_rows, group_size=4, seed=1, output=found),
        ]
        if settings.input:
            self.draw = []
        self.data = Path(settings.input or scenes)
        self.tests = settings.tests or {
            "long": TestSet(input=str(found)),
            "short": TestSet(input=str(found), column="short_caption"),
        }

    def of_stage(self, stage: Stage) -> Iterator[Step]:
        """Everything that a stage needs, in an order in which results come early."""
        yield from self.draw
        for cell in stage.cells:
            yield self.base(cell.seed)
            if cell.arm != "none":
                yield self.summaries(cell.strategy or self.settings.strategy)
                yield self.training(cell)
            yield self.measurement(cell)

    def base(self, seed: int) -> Step:
        """A CLIP with 77 positions, trained on short captions."""
        return self._training(
            f"base of seed {seed}",
            "demo_base",
            input=self.settings.base_input or self.data,
            columns__caption="caption" if self.settings.base_input else "short_caption",
            optim__epochs=self.settings.base_epochs,
            seed=seed,
            output=self._run(f"base-{seed}"),
        )

    def summaries(self, strategy: str) -> Step:
        """The training data with summaries."""
        output = self.directory / f"summarized-{strategy}"
        title = f"summaries by {strategy}"
        return Step(title, summarize, input=self.data, output=output, strategy=strategy)

    def training(self, cell: Cell) -> Step:
        """The fine-tuning of a cell."""
        summary = {"loss__pca_dim": cell.pca_dim} if cell.weight else {}
        return self._training(
            cell.name,
            "demo_finetune",
            input=self.directory / f"summarized-{cell.strategy or self.settings.strategy}",
            model__base=self._run(f"base-{cell.seed}") / "checkpoint",
            model__positions=ARMS[cell.arm].positions,
            loss__summary_loss_weight=cell.weight,
            **summary,
            optim__epochs=self.settings.epochs,
            seed=cell.seed,
            output=self._run(cell.name),
        )

    def measurement(self, cell: Cell) -> Step:
        """A cell on all texts."""
        run = f"base-{cell.seed}" if cell.arm == "none" else cell.name
        tasks = ", ".join(
            f"{name}: {{input: {found.input}, text: {name}, source: {{caption: {found.column}}}}}"
            for name, found in self.tests.items()
        )
        return Step(
            f"measure {cell.name}",
            benchmark,
            tasks=f"{{{tasks}}}",
            models=f"{{{cell.name}: {self._run(run) / 'checkpoint'}}}",
            long_text="false",
            output=self.directory / "cells" / cell.name,
        )

    def _training(self, title: str, config: str, **settings: object) -> Step:
        return Step(
            title,
            finetune,
            config,
            **settings,
            optim__learning_rate=self.settings.learning_rate,
            optim__per_worker_batch_size=self.settings.batch_size,
            workers__count=self.settings.workers.count,
            workers__use_gpu=str(self.settings.workers.use_gpu).lower(),
            workers__bf16=str(self.settings.bf16).lower(),
        )

    def _run(self, name: str) -> Path:
        return self.directory / "runs" / name


def _write_report(report: StudyReport, directory: Path) -> None:
    with whole_directory(directory) as aside:
        (aside / "report.md").write_text(report.markdown())
        (aside / "report.json").write_text(json.dumps(report.asdict(), indent=2) + "\n")
        for result in report.stages:
            (aside / f"{result.slug}.svg").write_text(stage_plot(result))


if __name__ == "__main__":
    run_entry(main)
