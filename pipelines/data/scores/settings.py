"""Settings of `score.py`. Imports neither Ray nor torch: `--help` needs this module."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from longclip.constants import Activation
from pipelines.common.columns import Columns
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage
from pipelines.common.workers import Workers

CLIPSCORE_WEIGHT = 2.5
"""Factor of CLIPScore (arXiv 2104.08718, section 3)."""


class ScoreSettings(Settings):
    """All settings of `score.py`."""

    input: str
    """Parquet file, directory or URI with images and captions; all columns are kept."""
    model: str
    """Checkpoint directory, hub name, models:/NAME/VERSION, models:/NAME@ALIAS, or a file of official weights."""
    activation: Activation | None = None
    """Activation (quick_gelu, gelu) of a weights file without a config next to it; null assumes quick_gelu with a
    warning."""
    output: str
    """Directory or URI of the output."""
    measure: Literal["cosine", "clipscore"] = "cosine"
    """cosine (as LAION and DataComp filter by), or clipscore: 2.5 * max(cosine, 0)."""
    score_column: str = Field("clip_score", min_length=1)
    """Column for the scores of the captions; those of summaries go to summary_<score_column>."""
    min_score: float | None = None
    """Leave out rows whose caption has a lower score."""
    keep_share: float | None = Field(None, gt=0, le=1)
    """Keep this share of the rows, those with the highest scores; rows with equal scores are kept together."""
    columns: Columns = Columns()
    workers: Workers = Workers()
    batch_size: PositiveInt = 128
    """Rows per forward pass."""
    rows_per_piece: PositiveInt = 2048
    """Rows per unit of work: what a killed job repeats at most, per worker."""
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum share of rows without a usable image and caption before the job fails."""
    overwrite: bool = False
    """Replace an existing output, or unfinished work, that was made with other settings or data."""
    cache: str = "~/.cache/longclip/models"
    """Directory for downloaded and converted models; on a cluster, one that all nodes share."""
    storage: Storage = Storage()

    @property
    def summary_score_column(self) -> str:
        """Column for the scores of the summaries."""
        return f"summary_{self.score_column}"

    @model_validator(mode="after")
    def _one_filter(self) -> Self:
        if self.min_score is not None and self.keep_share is not None:
            raise ValueError("min_score and keep_share are both set; leave one of them null")
        return self


NOT_IN_IDENTITY = {
    "model",  # its content is in the identity instead
    "activation",
    "output",
    "storage",
    "overwrite",
    "max_rejected_fraction",
    "workers",
    "batch_size",
    "cache",
}
"""Settings that do not affect the content of the output: a rerun that changes them continues the same work."""
