"""Settings of `embed.py`. Imports neither Ray nor torch: `--help` needs this module."""

from pydantic import Field, PositiveInt

from longclip.constants import Activation
from pipelines.common.columns import Columns
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage
from pipelines.common.workers import Workers


class PublishSettings(Settings):
    """Settings of the published versions."""

    exact_rows: PositiveInt = 200_000
    """Maximum items of a shard that is searched exactly, by comparing all vectors; larger ones get an IVF structure."""
    shard_rows: PositiveInt = 2_000_000
    """Maximum items of a shard. Shards are built, and may be searched, on different machines."""
    min_recall: float = Field(default=0.95, ge=0, le=1)
    """Minimum recall of the exact top ten for text queries; below it nothing is published."""
    gate_queries: PositiveInt = 1000
    """Number of items whose captions and images are the queries of that measurement."""


class EmbedSettings(PublishSettings):
    """Settings of an index."""

    input: str | None = None
    """Parquet file, directory or URI with images and captions; not needed to delete items."""
    model: str
    """Checkpoint directory, models:/NAME/VERSION, models:/NAME@ALIAS, or a file of official weights."""
    activation: Activation | None = None
    """Activation (quick_gelu, gelu) of a weights file without a config next to it; null assumes quick_gelu with a
    warning."""
    output: str = "var/index"
    """Directory or URI of the index. Its items are kept, unless the input has other ones with the same ids."""
    columns: Columns = Columns()
    storage: Storage = Storage()
    workers: Workers = Workers()
    caption_vectors: bool = True
    """Also embed the captions: to search among them, and to measure how well texts find images."""
    metadata: list[str] = Field(default=[])
    """Columns to filter a search by: text, numbers or booleans."""
    delete: list[str] = Field(default=[])
    """Ids of items to delete."""
    delete_missing: bool = False
    """Delete items that are not in the input, so that the index holds exactly the input."""
    commit_rows: PositiveInt = 4096
    """Items per commit: the maximum that is embedded a second time after a kill."""
    max_rejected_fraction: float = Field(default=0.01, ge=0, le=1)
    """Maximum share of unusable rows; the job stops above it."""
    cache: str = "~/.cache/longclip/models"
    """Directory for downloaded and converted models; on a cluster, one that all nodes share."""
