"""Settings of the study."""

from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from longclip.text.summaries import Strategy
from pipelines.common.settings import Settings
from pipelines.common.workers import Workers

PLANNED = ("seeds", "varied_seeds", "weight", "strategy", "pca_dim", "weights", "strategies", "pca_dims", "combine")
"""Settings that only select cells; each cell's name contains its own values of them."""


class TestSet(Settings):
    """A test set."""

    input: str
    """Parquet file or directory with images and captions."""
    column: str = "caption"
    """Column of the captions."""


class StudySettings(Settings):
    """Settings of a study."""

    output: str = "var/study"
    """Local directory for all files."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Seeds; one base model and all arms are trained for each."""
    varied_seeds: list[int] = Field(default=[0], min_length=1)
    """The seeds for which weight, summaries and components are varied."""
    train_rows: PositiveInt = 2500
    """Number of synthetic scenes for training, without `input`."""
    test_rows: PositiveInt = 500
    """Number of synthetic scenes for testing, in groups of four whose captions differ only after token 77."""
    input: str | None = None
    """Long captions to fine-tune on, in a column `caption`; null draws synthetic scenes."""
    base_input: str | None = None
    """Short captions to train bases on, in a column `caption`; null takes the short captions of the scenes."""
    tests: dict[str, TestSet] = Field(default={})
    """Test sets by kind of captions, long or short; empty for those of the scenes."""
    base_epochs: PositiveInt = 5
    """Epochs of a base model."""
    epochs: PositiveInt = 2
    """Epochs of a fine-tuning."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of every training; small models from scratch need a much higher one than pretrained models."""
    batch_size: PositiveInt = 64
    """Image-caption pairs per step and worker."""
    workers: Workers = Workers()
    """Training processes of a run."""
    bf16: bool = True
    """Train with bfloat16 autocast. Results are always measured in float32."""
    weight: PositiveFloat = 0.3
    """Weight of the summary loss, unless it is varied."""
    strategy: Strategy = "extractive"
    """Summary strategy, unless it is varied."""
    pca_dim: PositiveInt = 32
    """Number of principal components, unless it is varied."""
    weights: list[float] = Field(default=[0.0, 0.1, 0.3, 1.0], min_length=1)
    """Weights to compare; 0 is the arm without component matching."""
    strategies: list[Strategy] = Field(default=["extractive", "first_sentence", "drop_first"])
    """Summary strategies to compare."""
    pca_dims: list[PositiveInt] = Field(default=[8, 16, 32])
    """Numbers of components to compare."""
    combine: bool = False
    """Also train every combination of the three."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.input) != bool(self.tests) or bool(self.input) != bool(self.base_input):
            raise ValueError(
                "input, base_input and tests belong together; give all of them, or none for synthetic scenes"
            )
        if other := set(self.tests) - {"long", "short"}:
            raise ValueError(f"tests has '{min(other)}'; name a test set long or short, as its captions are")
        if unknown := set(self.varied_seeds) - set(self.seeds):
            raise ValueError(f"varied_seeds has {min(unknown)}, which is not among seeds={self.seeds}")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that change a cell's result and are not in its name."""
        return self.model_dump(mode="json", exclude={"output", *PLANNED})
