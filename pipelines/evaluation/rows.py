"""The rows of a task as a Ray dataset, with hard negatives and prefixes of their captions."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.text.perturbations import hard_negative
from longclip.tokenizer import load_tokenizer
from pipelines.data.sources.source import Piece, Source
from pipelines.evaluation.questions.monotonicity import PREFIXES, prefix

ROWS_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("captions", pa.list_(pa.string()))])
ROWS_AT_ONCE = 64


def source_dataset(
    source: Source, pieces: list[Piece], quarantine: Any, captions_per_image: int | None, derived: Sequence[str] = ()
) -> Dataset:
    """The usable rows of a source as a Ray dataset.

    Args:
        source: where the rows are read from.
        pieces: its pieces, which are read in parallel.
        quarantine: handle of a `Quarantine` actor, for rows that cannot be used.
        captions_per_image: maximum captions per row; None for all.
        derived: kinds of hard negatives, and names of prefixes, to add.

    Returns:
        Rows with `id`, `image` (bytes), `captions`, and one column per derived text with that of each caption, or the
        caption itself if it has none.
    """
    schema = ROWS_SCHEMA
    for name in derived:
        schema = schema.append(pa.field(name, pa.list_(pa.string())))

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        for number in batch["piece"]:
            for row in source.read(pieces[number]):
                if row.problem:
                    ray.get(quarantine.add.remote({row.id: row.problem}))
                    continue
                captions = row.captions[:captions_per_image]
                texts = {name: [_derived(name, row.id, *item) for item in enumerate(captions)] for name in derived}
                rows.append({"id": row.id, "image": row.image, "captions": captions, **texts})
                if len(rows) == ROWS_AT_ONCE:
                    yield pa.Table.from_pylist(rows, schema)
                    rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema)

    numbers = ray.data.from_items([{"piece": number} for number in range(len(pieces))], override_num_blocks=len(pieces))
    return numbers.map_batches(read, batch_size=1)


def _derived(name: str, row: str, number: int, caption: str) -> str:
    if name in PREFIXES:
        return prefix(name, caption)
    return hard_negative(name, caption, f"{row}#{number}", load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH)) or caption
