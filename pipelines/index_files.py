"""The search index on disk: embeddings.npy, items.parquet (id, caption, thumbnail) and a manifest with checksums."""

import io
import json
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longclip.errors import DataError, ImageError
from longclip.files import file_sha256, whole_directory
from longclip.images import decode_image
from pipelines.model_inputs import image_bytes
from pipelines.records import Columns

INDEX_VERSION = 1
THUMBNAIL_SIDE = 256
EMBEDDINGS, ITEMS, MANIFEST = "embeddings.npy", "items.parquet", "manifest.json"


class AddThumbnails:
    """Adds a `thumbnail` (JPEG, at most `THUMBNAIL_SIDE` pixels a side); empty where the image cannot be read."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with thumbnails."""
        return batch | {"thumbnail": [self._thumbnail(cell) for cell in batch[self.columns.image]]}

    def _thumbnail(self, cell: Any) -> bytes:
        try:
            image = decode_image(image_bytes(cell))
        except ImageError:
            return b""  # the row is rejected, with its reason, where its pixels are made
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        return out.getvalue()


def write_index(output: Path, rows: list[dict[str, Any]], columns: Columns, origin: dict[str, Any]) -> None:
    """Write an index directory, whole or not at all; rows are sorted by id, so a rerun gives the same files.

    Raises:
        DataError: two rows have the same id.
    """
    rows = sorted(rows, key=lambda row: str(row[columns.id]))
    ids = [str(row[columns.id]) for row in rows]
    doubled = next((a for a, b in pairwise(ids) if a == b), None)
    if doubled is not None:
        raise DataError(f"column '{columns.id}': id '{doubled}' occurs more than once; ids must be unique")
    items = {
        "id": ids,
        "caption": [str(row[columns.caption] or "") for row in rows],
        "thumbnail": [row["thumbnail"] for row in rows],
    }
    schema = pa.schema([("id", pa.string()), ("caption", pa.string()), ("thumbnail", pa.binary())])
    embeddings = np.stack([row["image_embedding"] for row in rows]).astype(np.float32)
    with whole_directory(output) as aside:
        np.save(aside / EMBEDDINGS, embeddings, allow_pickle=False)
        pq.write_table(pa.table(items, schema=schema), aside / ITEMS)
        manifest = origin | {
            "manifest_version": INDEX_VERSION,
            "embedding_dim": embeddings.shape[1],
            "count": len(ids),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "sha256": {name: file_sha256(aside / name) for name in (EMBEDDINGS, ITEMS)},
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
