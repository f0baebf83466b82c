"""The job of `embed.py`: embed what changed, delete what is gone, and publish a version."""

from pathlib import Path

import ray

from longclip.checkpoint import Checkpoint, checkpoint_id, load_checkpoint
from longclip.errors import ConfigError
from pipelines.common.cluster import connect
from pipelines.common.lease import Lease
from pipelines.common.parquet_set import open_parquet
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import QUARANTINE, start_quarantine, write_quarantine
from pipelines.common.storage import is_local, local_path, output_path, storage_path
from pipelines.common.whole_files import make_directory
from pipelines.indexing.corpus import Corpus, embed_changes
from pipelines.indexing.publish import publish_changes
from pipelines.indexing.settings import EmbedSettings
from pipelines.indexing.table import IndexTable, table_schema
from pipelines.registry.model_cache import local_model
from pipelines.registry.server import tracking_uri

LEASE = ".lease"


def embed(settings: EmbedSettings) -> None:
    """Bring the index up to date and print the summary line.

    Raises:
        ConfigError: there is nothing to do, or another job writes the index.
        CheckpointError: the model cannot be read.
        DataError: the input cannot be read, or too many of its rows are unusable.
    """
    progress = Progress("embed")
    if not settings.input and not settings.delete:
        raise ConfigError(
            "give a Parquet to embed with --set input=..., or ids of items to delete with --set delete=[...]"
        )
    index = output_path("output", storage_path("output", settings.output), settings.storage)
    cache = local_path("cache", settings.cache)
    registry = tracking_uri(Path(index.path).parent if is_local(index) else cache)
    model = local_model(settings.model, cache, registry, settings.activation)
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
