"""Settings of the study."""

from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from longclip.text.summaries import Strategy
from pipelines.common.settings import Settings
from pipelines.common.workers import Workers

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
