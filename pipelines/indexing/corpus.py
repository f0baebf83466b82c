"""From rows to items of an index: corpus -> changes -> decode and tokenize -> embed -> upsert, in commits."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from longclip.checkpoint import Checkpoint
from longclip.errors import DataError
from pipelines.common.columns import Columns, cell_texts
from pipelines.common.embedding import Reading, embed_dataset
from pipelines.common.events import report
from pipelines.common.parquet_set import ParquetSet
from pipelines.common.progress import export_rows
from pipelines.common.workers import Workers
from pipelines.indexing.changes import KeepChanges
from pipelines.indexing.table import CONTENT, ID, MODEL, RESERVED, IndexTable, States, vector_column

READ_ROWS = 64
THUMBNAIL_SIDE = 256
"""Pixels of the longer side of the picture that a search result shows."""


@dataclass(frozen=True)
class Corpus:
    """Rows to embed, and the model to embed them with."""

    data: ParquetSet
    columns: Columns
    schema: pa.Schema
    """Schema of the table of the index."""
    checkpoint: Checkpoint
    model: str
    """Directory that the workers load the checkpoint from."""
    checkpoint_id: str
    workers: Workers

    @property
    def metadata(self) -> list[str]:
        """Columns to filter by."""
        return [name for name in self.schema.names if name not in RESERVED]

    @property
    def readings(self) -> dict[str, Reading]:
        """Texts that are embedded: the first caption of each row, which is the one that the table keeps."""
        with_captions = vector_column("caption") in self.schema.names
        return {"caption": Reading(self.columns.caption, max_texts=1)} if with_captions else {}

    @cached_property
    def ids(self) -> set[str]:
        """Ids of all rows.

        Raises:
            DataError: an id occurs more than once.
        """
        counts = Counter[str]()
        for batch in self.data.dataset([self.columns.id]).iter_batches(batch_size=None, batch_format="pyarrow"):
            counts.update(str(id) for id in batch[self.columns.id].to_pylist())
        duplicate = next((id for id, count in counts.items() if count > 1), None)
        if duplicate is not None:
            raise DataError(f"column '{self.columns.id}': id '{duplicate}' occurs more than once; ids must be unique")
        return set(counts)


def embed_changes(
    corpus: Corpus, table: IndexTable, states: States, quarantine: Any, commit_rows: int, check: Callable[[], None]
) -> int:
    """Embed the rows that are new, changed, or embedded by another model; returns how many there were.

    Args:
        corpus: the rows.
        table: receives them. Commits stay, so a run that was killed resumes after its last one.
        states: content and model of the items of the table.
        quarantine: handle of a `Quarantine` actor, for rows that cannot be used.
        commit_rows: rows per commit.
        check: called before every commit; raises if this job must no longer write.
    """
    columns = corpus.columns
    assert corpus.ids  # duplicate ids are refused before anything is embedded
    changes = corpus.data.dataset([columns.id, columns.image, columns.caption, *corpus.metadata]).map_batches(
        KeepChanges(columns, corpus.metadata, corpus.checkpoint_id, ray.put(states)), batch_size=READ_ROWS
    )
    embedded = embed_dataset(
        changes,
        corpus.checkpoint,
        corpus.model,
        columns,
        quarantine,
        corpus.readings,
        keep=[columns.caption, CONTENT, *corpus.metadata],
        thumbnail_side=THUMBNAIL_SIDE,
        workers=corpus.workers,
    )
    written, started = 0, time.monotonic()
    for batch in embedded.iter_batches(batch_size=commit_rows, batch_format="numpy"):
        check()
        table.upsert(_items(batch, corpus))
        written += len(batch[columns.id])
        export_rows("embed", "embed", written, len(ray.get(quarantine.reasons.remote())))
        report(f"embed: {written} rows embedded and written, {written / (time.monotonic() - started):.0f} rows/s")
    return written


def _items(batch: dict[str, np.ndarray], corpus: Corpus) -> pa.Table:
    """Embedded rows as items of the table."""
    columns = corpus.columns
    count = len(batch[columns.id])
    texts = [cell_texts(cell) for cell in batch[columns.caption]]
    values: dict[str, Any] = {
        ID: [str(id) for id in batch[columns.id]],
        CONTENT: batch[CONTENT].tolist(),
        MODEL: [corpus.checkpoint_id] * count,
        "caption": [cell[0] if cell else "" for cell in texts],
        "thumbnail": batch["thumbnail"].tolist(),
    }
    vectors = {"image": batch["image_embedding"]}
    if "caption_embedding" in batch:
        vectors["caption"] = np.stack([cell[0] for cell in batch["caption_embedding"]])
    for target, array in vectors.items():
        kind = corpus.schema.field(vector_column(target)).type
        flat = pa.array(np.ascontiguousarray(array, np.float32).reshape(-1))
        values[vector_column(target)] = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    for name in corpus.metadata:
        values[name] = pa.array(batch[name].tolist(), corpus.schema.field(name).type, from_pandas=True)
    return pa.table({name: values[name] for name in corpus.schema.names}, schema=corpus.schema)
