"""Embed the images and captions of a Parquet into an index, and publish it for search.

    python pipelines/embed.py --set input=/data/corpus --set model=/data/run1/checkpoint --set output=/data/index
    python pipelines/embed.py --set input=s3://b/corpus --set model=models:/longclip@champion \\
        --set output=s3://b/index --set metadata=[place,year]
    python pipelines/embed.py --set model=... --set output=/data/index --set delete=[id1,id2]

An index is a Lance table of all items with their vectors, and published versions of that table that never change. Only
items that are new, that changed, or that another model embedded are embedded. A run that was killed resumes after its
last commit. Serving uses the newest version made with the model that it serves.
"""

from collections.abc import Sequence
from pathlib import Path

import ray
from pydantic import Field, PositiveInt

from longclip.checkpoint import Checkpoint, checkpoint_id, load_checkpoint
from longclip.errors import ConfigError
from pipelines.common.cluster import connect
from pipelines.common.columns import Columns
from pipelines.common.entry import run_entry
from pipelines.common.lease import Lease
from pipelines.common.parquet_set import open_parquet
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import QUARANTINE, start_quarantine, write_quarantine
from pipelines.common.settings import load_settings
from pipelines.common.storage import Storage, is_local, output_path, storage_path
from pipelines.common.whole_files import make_directory
from pipelines.common.workers import Workers
from pipelines.indexing.corpus import Corpus, embed_changes
from pipelines.indexing.publish import PublishSettings, publish_changes
from pipelines.indexing.table import IndexTable, table_schema
from pipelines.registry.model_cache import local_model
from pipelines.registry.server import tracking_uri

LEASE = ".lease"


class EmbedSettings(PublishSettings):
    """Settings of an index."""

    input: str | None = None
    """Parquet file, directory or URI with images and captions; not needed to delete items."""
    model: str
    """Checkpoint directory, models:/NAME/VERSION, models:/NAME@ALIAS, or a file of official weights."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(EmbedSettings, __doc__ or "", argv)
    progress = Progress("embed")
    if not settings.input and not settings.delete:
        raise ConfigError(
            "give a Parquet to embed with --set input=..., or ids of items to delete with --set delete=[...]"
        )
    index = output_path("output", storage_path("output", settings.output), settings.storage)
    cache = Path(storage_path("cache", settings.cache))
    registry = tracking_uri(Path(index.path).parent if is_local(index) else cache)
    model = local_model(settings.model, cache, registry)
    checkpoint = load_checkpoint(model)
    identity = checkpoint_id(model)
    corpus = _corpus(settings, settings.input, checkpoint, model, identity) if settings.input else None
    make_directory(index)
    connect(settings.workers.total_cpus + 2)
    with Lease(index / LEASE, str(index)) as lease:
        table = IndexTable(index, settings.storage)
        deleted = table.delete(settings.delete)
        rows = embedded = rejected = 0
        if corpus:
            table.require(corpus.schema)
            rows = corpus.data.rows
            states = table.states()
            quarantine = start_quarantine(rows, settings.max_rejected_fraction)
            embedded = embed_changes(corpus, table, states, quarantine, settings.commit_rows, lease.check)
            reasons = ray.get(quarantine.reasons.remote())
            rejected = len(reasons)
            missing = states.keys() - corpus.ids if settings.delete_missing else set()
            deleted += table.delete(reasons.keys() | missing)
            write_quarantine(reasons, str(corpus.data.root), "embed", index / QUARANTINE)
        lease.check()
        version = publish_changes(index, table, settings, checkpoint, identity, settings.input)
    detail = f"{embedded} embedded, {rows - embedded - rejected} unchanged, {deleted} deleted; index {index}, {version}"
    progress.summary(rows, rows - rejected, rejected, detail)


def _corpus(settings: EmbedSettings, path: str, checkpoint: Checkpoint, model: str, identity: str) -> Corpus:
    columns = settings.columns
    needed = [columns.id, columns.image, columns.caption, *settings.metadata]
    data = open_parquet("input", path, settings.storage, needed)
    dim = checkpoint.model.config.projection_dim
    schema = table_schema(dim, settings.caption_vectors, settings.metadata, data.schema)
    return Corpus(data, columns, schema, checkpoint, model, identity, settings.workers)


if __name__ == "__main__":
    run_entry(main)
