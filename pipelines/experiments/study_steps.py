"""The entries that a study runs, with their settings."""

from collections.abc import Iterator
from pathlib import Path

from pipelines import benchmark, finetune, sample_data, summarize
from pipelines.experiments.cells import ARMS, Cell, Stage
from pipelines.experiments.steps import Step
from pipelines.experiments.study_settings import StudySettings, TestSet


class StudySteps:
    """The entries of a study with their settings. Cells share steps; a step runs once."""

    def __init__(self, settings: StudySettings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        scenes, test_scenes = directory / "scenes-train", directory / "scenes-test"
        self.draw = [
            Step("draw scenes to train on", sample_data, rows=settings.train_rows, output=scenes),
            Step(
                "draw scenes to search", sample_data, rows=settings.test_rows, group_size=4, seed=1, output=test_scenes
            ),
        ]
        if settings.input:
            self.draw = []
        self.data = settings.input or str(scenes)
        self.tests = settings.tests or {
            "long": TestSet(input=str(test_scenes)),
            "short": TestSet(input=str(test_scenes), column="short_caption"),
        }

    def of_stage(self, stage: Stage) -> Iterator[Step]:
        """All steps of a stage, cell by cell, so that results come early."""
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
        """The measurement of a cell on all test sets."""
        run = f"base-{cell.seed}" if cell.arm == "none" else cell.name
        tasks = {
            name: {"input": test.input, "text": name, "source": {"caption": test.column}}
            for name, test in self.tests.items()
        }
        return Step(
            f"measure {cell.name}",
            benchmark,
            tasks=tasks,
            models={cell.name: str(self._run(run) / "checkpoint")},
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
