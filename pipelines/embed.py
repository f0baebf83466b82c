"""Embed the images of a Parquet and write a search index that names the model it was made with.

The index is a directory of embeddings.npy, items.parquet (id, caption, thumbnail) and a manifest with checksums.
Serving refuses it with any other model.

    python pipelines/embed.py --set data=/data/corpus --set model=/data/run1/checkpoint --set output=/data/index
"""

from collections.abc import Sequence
from pathlib import Path

import ray
from pydantic import Field

from longclip.checkpoint import checkpoint_id, load_checkpoint
from longclip.errors import DataError
from pipelines.embedding import EmbeddingSettings, embed_dataset
from pipelines.entry import Progress, connect, run_entry
from pipelines.index_files import AddThumbnails, write_index
from pipelines.parquet_files import open_parquet
from pipelines.records import start_quarantine, write_quarantine
from pipelines.settings import load_settings, storage_path


class EmbedSettings(EmbeddingSettings):
    """Everything that defines an index."""

    model: str
    """Checkpoint directory."""
    output: str = "var/index"
    """Local directory of the index; replaced if it exists."""
    max_rejected_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of rows that may be unusable before the job stops."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(EmbedSettings, __doc__ or "", argv)
    progress = Progress("embed")
    model = storage_path("model", settings.model)
    output = Path(storage_path("output", settings.output))
    checkpoint = load_checkpoint(model)
    columns = settings.columns
    needed = [columns.id, columns.image, columns.caption]
    data = open_parquet("data", settings.data, settings.storage, needed)
    rows = data.rows
    connect(settings.workers + 2)
    quarantine = start_quarantine(rows, settings.max_rejected_fraction)
    thumbnails = data.dataset(needed).map_batches(AddThumbnails(columns), batch_size=64)
    embedded = embed_dataset(
        thumbnails,
        checkpoint,
        model,
        columns,
        quarantine,
        keep=[columns.caption, "thumbnail"],
        workers=settings.workers,
        use_gpu=settings.use_gpu,
    ).take_all()
    reasons = ray.get(quarantine.reasons.remote())
    if not embedded:
        raise DataError(f"data='{data.root}': none of the {rows} rows has a readable image")
    manifest = {
        "checkpoint_id": checkpoint_id(model),
        "context_length": checkpoint.context_length,
        "source": str(data.root),
    }
    write_index(output, embedded, columns, manifest)
    write_quarantine(reasons, settings.data, "embed", output.with_name(output.name + ".quarantine.parquet"))
    progress.summary(rows, len(embedded), len(reasons), f"index {output}")


if __name__ == "__main__":
    run_entry(main)
