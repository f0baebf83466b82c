"""The task that scores the rows of one piece of a Parquet."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from upath import UPath

from longclip.checkpoint import Checkpoint, load_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.errors import DataError
from longclip.tokenizer import tokenize
from pipelines.common.columns import image_bytes
from pipelines.common.embedding import load_on_this_node
from pipelines.common.parquet_rows import Damaged, part_rows, read_cells, read_rows
from pipelines.common.rejected_rows import Rejected, write_rejected
from pipelines.common.storage import arrow_filesystem, explained, open_path
from pipelines.common.whole_files import whole_file
from pipelines.data.scores.settings import CLIPSCORE_WEIGHT, ScoreSettings
from pipelines.data.sources.captions import caption_texts

SCORES = pa.list_(pa.float32())
SCORES_SCHEMA = pa.schema([("row", pa.int64()), ("caption", SCORES), ("summary", SCORES)])
"""Scores of the texts of each usable row of a piece; `row` is its number in the piece."""


@dataclass(frozen=True)
class Pair:
    """A usable row."""

    row: int
    """Its number in the piece."""
    pixels: np.ndarray
    """`[S, S, 3]` uint8."""
    texts: dict[str, list[str]]
    """Texts that are not empty, by role: `caption`, and `summary` if the input has summaries."""


@dataclass(frozen=True)
class Unusable:
    """A row that cannot be scored; see `pipelines.common.rejected_rows.Rejected.add`."""

    id: str
    reason: str
    caption: str
    image: bytes


@dataclass
class PieceCounts:
    """Counts of a piece."""

    rejected: Rejected
    rows_in: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    """Number of texts by role, and as `<role>_cut` of those that are longer than the model reads."""


class ScorePiece:
    """Scores the rows of a piece; each process loads the model once."""

    def __init__(self, settings: ScoreSettings, model: str, roles: tuple[str, ...], folder: UPath) -> None:
        """
        Args:
            settings: columns, batch size, and access to the storage of the input.
            model: argument of `load_checkpoint`.
            roles: text columns to score: `caption`, and `summary` if the input has summaries.
            folder: directory for scores and rejected rows.
        """
        self.settings, self.model, self.roles, self.folder = settings, model, roles, folder
        self._loaded: Checkpoint | None = None

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Score a piece; see `pipelines.data.work_units.UnitTask`. The result also has `texts`, counts by role."""
        if self._loaded is None:
            self._loaded = load_on_this_node(lambda: load_checkpoint(self.model))
            self._loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        counts = PieceCounts(Rejected(unit["file"]))
        scores = [row for pairs in self._batches(unit, counts) for row in self._scores(self._loaded, pairs, counts)]
        with whole_file(scores_path(self.folder, number)) as local:
            pq.write_table(pa.Table.from_pylist(scores, SCORES_SCHEMA), local)
        write_rejected(counts.rejected, self.folder, number)
        return {
            "rows_in": counts.rows_in,
            "rows_out": len(scores),
            "rejected": len(counts.rejected),
            "first_rejected": counts.rejected.first,
            "reasons": counts.rejected.grouped,
            "texts": counts.texts,
        }

    def _batches(self, unit: dict[str, Any], counts: PieceCounts) -> Iterator[list[Pair]]:
        """The usable rows of a piece. A batch is decoded in threads while the one before it is encoded."""
        waiting: list[Future[Pair | Unusable]] = []
        with ThreadPoolExecutor(self.settings.workers.cpus) as pool:
            for rows in self._rows(unit, counts):
                decoding = [pool.submit(self._pair, *row) for row in rows]
                yield _usable(waiting, counts)
                waiting = decoding
            yield _usable(waiting, counts)

    def _rows(self, unit: dict[str, Any], counts: PieceCounts) -> Iterator[list[tuple[int, str, dict[str, Any]]]]:
        """Number, id and cells of the rows of a piece that can be read."""
        columns = self.settings.columns
        path = open_path("input", unit["file"], self.settings.storage)
        with explained("input", path):
            names = pq.read_schema(path.path, filesystem=arrow_filesystem(path)).names
            wanted = [columns.image, *(getattr(columns, role) for role in self.roles)]
            if columns.id in names:
                wanted.append(columns.id)
            for part in read_rows(path, unit["first"], unit["rows"], self.settings.batch_size, wanted):
                first = counts.rows_in
                numbered = [f"{unit['name']}:{row}" for row in range(first, first + part_rows(part))]
                counts.rows_in += len(numbered)
                if isinstance(part, Damaged):
                    for row_id in numbered:
                        counts.rejected.add(row_id, "read", part.problem)
                    continue
                rows = []
                cells, problems = read_cells(part)
                for place, row in enumerate(cells):
                    value = row.get(columns.id)
                    row_id = numbered[place] if value is None else str(value)
                    if place in problems:
                        counts.rejected.add(row_id, "read", problems[place])
                    else:
                        rows.append((first + place, row_id, row))
                yield rows

    def _pair(self, number: int, row_id: str, row: dict[str, Any]) -> Pair | Unusable:
        """A row with its image decoded."""
        assert self._loaded is not None
        columns = self.settings.columns
        texts: dict[str, list[str]] = {}
        image = b""
        try:
            for role in self.roles:
                cell = row[getattr(columns, role)]
                read, problem = caption_texts(cell) if cell is not None else ([], None)
                texts[role] = [text for text in read if text.strip()]
                if problem or (role == "caption" and not texts[role]):
                    raise DataError(problem or f"column '{columns.caption}' has no text")
            image = image_bytes(row[columns.image])
            return Pair(number, self._loaded.transform.pixels(image), texts)
        except DataError as error:
            return Unusable(row_id, str(error), " ".join(texts.get("caption", [])), image)

    @torch.inference_mode()
    def _scores(self, checkpoint: Checkpoint, pairs: list[Pair], counts: PieceCounts) -> list[dict[str, Any]]:
        """Rows of `SCORES_SCHEMA`."""
        if not pairs:
            return []
        model = checkpoint.model
        pixels = torch.from_numpy(np.stack([pair.pixels for pair in pairs])).to(model.device)
        images = unit(encode_image(model, checkpoint.transform.normalize(pixels)))
        rows: list[dict[str, Any]] = [{"row": pair.row} for pair in pairs]
        for role in self.roles:
            cells = [pair.texts[role] for pair in pairs]
            sizes = [len(cell) for cell in cells]
            counts.texts[role] += sum(sizes)
            if not any(sizes):
                continue
            tokens = tokenize(checkpoint.tokenizer, [text for cell in cells for text in cell])
            counts.texts[f"{role}_cut"] += int((tokens.full_lengths > tokens.lengths).sum())
            texts = unit(encode_text(model, tokens))
            image_of_text = torch.repeat_interleave(torch.tensor(sizes)).to(model.device)
            cosines = (images[image_of_text] * texts).sum(dim=1).cpu()
            for row, values in zip(rows, self._measured(cosines).split(sizes), strict=True):
                row[role] = values.tolist()
        return rows

    def _measured(self, cosines: Tensor) -> Tensor:
        return CLIPSCORE_WEIGHT * cosines.clamp(min=0) if self.settings.measure == "clipscore" else cosines


def row_scores(scores: pa.Table) -> np.ndarray:
    """Score of each row `[n]` float32: the mean over its captions."""
    return np.array([np.mean(cell) for cell in scores["caption"].to_pylist()], np.float32)


def _usable(rows: Sequence[Future[Pair | Unusable]], counts: PieceCounts) -> list[Pair]:
    pairs = []
    for row in (future.result() for future in rows):
        if isinstance(row, Pair):
            pairs.append(row)
        else:
            counts.rejected.add(row.id, "score", row.reason, row.caption, row.image)
    return pairs


def scores_path(folder: UPath, number: int) -> UPath:
    """File of the scores of a piece."""
    return folder / f"{number:06d}.scores.parquet"


def read_scores(folder: UPath, number: int) -> pa.Table:
    """Scores of a piece, in `SCORES_SCHEMA`."""
    path = scores_path(folder, number)
    return pq.read_table(path.path, filesystem=arrow_filesystem(path))
