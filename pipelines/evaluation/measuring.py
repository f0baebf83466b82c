"""Measuring a model on a task: embed over Ray Data, rank every query, and keep each rank by the query's id."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import Dataset
from upath import UPath

from longclip.checkpoint import load_checkpoint
from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import DataError
from longclip.evaluation.metrics import RECALL_AT, Ranks, classification_ranks, retrieval_ranks
from longclip.evaluation.significance import Comparison, compare_paired, mean_interval
from longclip.text.perturbations import CHANGES, KINDS, hard_negative
from longclip.tokenizer import load_tokenizer
from longclip.zero_shot import class_embeddings
from pipelines.common.embedding import Reading, embed_dataset
from pipelines.common.model_inputs import cell_texts
from pipelines.common.rejected_rows import Columns, start_quarantine
from pipelines.common.workers import Workers
from pipelines.data.sources.source import Piece, Source
from pipelines.evaluation.tasks import Task, label_classes, templates_of

ROWS_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("captions", pa.list_(pa.string()))])
ROWS_AT_ONCE = 64
WHOLE = "whole"
"""Reading of the texts as they are, as far as the model reads."""

CUTS = (10, 20, 40, 77, 128, 248)
"""Tokens that are read of long texts, to see up to which length more text helps."""

ROUNDING = 1e-6
"""Scores that are nearer than this are equal: the same tokens in another batch differ by so much."""


@dataclass(frozen=True)
class Answers:
    """Ranks of the queries of one direction, each with its id."""

    ranks: Ranks
    queries: tuple[str, ...]
    """Id of each query: the image's, and the number of the text for a text."""
    groups: np.ndarray
    """`[Q]` row of the image that each query belongs to."""

    def hits(self, k: int = 1) -> np.ndarray:
        """`[Q]` whether each query has a right candidate among the first k."""
        return (self.ranks.rank < k).numpy().astype(np.float64)

    def figures(self) -> dict[str, Any]:
        """Figures of `Ranks`; recall and mAP with the bounds of their intervals, as `{value, low, high}`."""
        values = {f"recall@{k}": self.hits(k) for k in RECALL_AT} | {"map": self.ranks.average_precision.numpy()}
        figures: dict[str, Any] = dict(self.ranks.figures())
        for name, value in values.items():
            low, high = mean_interval(value, self.groups)
            figures[name] = {"value": figures[name], "low": low, "high": high}
        return figures


@dataclass(frozen=True)
class Choices:
    """Whether images lie nearer to their captions than to hard negatives of them."""

    margins: np.ndarray
    """`[P]` score of each caption less that of its negative."""
    groups: np.ndarray
    """`[P]` row of the image that each caption belongs to."""
    texts: int
    """Captions that were looked at, those included of which there is no negative."""

    def figures(self) -> dict[str, float]:
        """Share of right choices with its interval (chance is a half), and the counts; equal scores are not right."""
        right = self.margins > ROUNDING
        low, high = mean_interval(right.astype(np.float64), self.groups)
        counts = {"right": int(right.sum()), "equal": int((np.abs(self.margins) <= ROUNDING).sum())}
        return {
            "value": float(right.mean()),
            "low": low,
            "high": high,
            **counts,
            "pairs": len(right),
            "texts": self.texts,
        }


@dataclass(frozen=True)
class Measured:
    """A model on a task."""

    protocol: str
    """What the result may be called; begins with NOT where the set was not the protocol's."""
    context_length: int
    images: int
    texts: int | None
    """Number of texts; None for classification."""
    texts_cut: int
    """Texts that were longer than what the model reads."""
    answers: dict[str, dict[str, Answers]]
    """Reading -> direction -> answers; `WHOLE` is always there."""
    rejected: dict[str, str]
    """Rows that could not be used, with the reason."""
    choices: dict[str, Choices] = field(default_factory=dict)
    """By kind of hard negatives, for long texts that were studied; kinds of which there were none are left out."""

    @property
    def whole(self) -> dict[str, Answers]:
        """Answers to the texts as they are."""
        return self.answers[WHOLE]


def readings(task: Task, context_length: int, long_text: bool) -> dict[str, Reading]:
    """How the texts of a task are read.

    Args:
        task: the task.
        context_length: tokens that the model reads; a cut there, or behind it, would be the whole.
        long_text: also cut and changed, to see what the model does with long text; for sets of long texts only.
    """
    if task.is_zero_shot:
        return {}
    plain = {WHOLE: Reading("captions")}
    if not long_text or task.protocol.text != "long":
        return plain
    cuts = {f"cut_{cut}": Reading("captions", context_length=cut) for cut in CUTS if cut < context_length}
    changes = {change: Reading("captions", change=change) for change in CHANGES}
    return plain | cuts | changes | {kind: Reading(kind) for kind in KINDS}


def measure(
    model: str, task: Task, scratch: UPath, max_rejected_fraction: float, workers: Workers, long_text: bool
) -> Measured:
    """Embed a task's images and texts with a model and rank them.

    Args:
        model: what `load_checkpoint` takes.
        task: what to measure.
        scratch: existing directory that all nodes see.
        max_rejected_fraction: share of rows that may be unusable.
        workers: actors that hold the model.
        long_text: see `readings`.

    Raises:
        DataError: too many rows are unusable, ids are not unique, or the counts are not the protocol's.
    """
    checkpoint = load_checkpoint(model)
    pieces = task.source.pieces(scratch)
    quarantine = start_quarantine(sum(piece.rows or 0 for piece in pieces), max_rejected_fraction)
    read = readings(task, checkpoint.context_length, long_text)
    kinds = [kind for kind in KINDS if kind in read]
    rows = embed_dataset(
        source_dataset(task.source, pieces, quarantine, task.protocol.captions_per_image, kinds),
        checkpoint,
        model,
        Columns(),
        quarantine,
        read,
        keep=["captions", *kinds] if task.is_zero_shot or kinds else [],
        workers=workers,
    ).take_all()
    rows.sort(key=lambda row: row["id"])  # Ray Data keeps no order
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(key for before, key in pairwise(ids) if before == key)
        raise DataError(f"tasks.{task.name}.input: id '{twice}' is there twice; name a unique one with source.id")
    images = torch.from_numpy(np.stack([row["image_embedding"] for row in rows])) if rows else torch.zeros(0, 1)
    texts = None if task.is_zero_shot else sum(len(row[f"{WHOLE}_embedding"]) for row in rows)
    protocol = task.check_counts(len(ids), texts)
    if not ids:
        raise DataError(f"tasks.{task.name}.input has no usable row")
    if task.is_zero_shot:
        names, labels = label_classes(task, [row["captions"][0] for row in rows])
        classes = class_embeddings(checkpoint, names, templates_of(task))
        found = classification_ranks(images, classes, torch.tensor(labels))
        answers = {WHOLE: {"image_to_class": Answers(found, tuple(ids), np.arange(len(ids)))}}
    else:
        answers = {
            name: _retrieval(ids, images, [row[f"{name}_embedding"] for row in rows])
            for name in read
            if name not in kinds
        }
    cut = sum(int(row[f"{WHOLE}_cut"]) for row in rows) if texts else 0
    rejected = ray.get(quarantine.reasons.remote())
    choices = {kind: pairs for kind in kinds if len((pairs := _choices(images, rows, kind)).margins)}
    return Measured(protocol, checkpoint.context_length, len(ids), texts, cut, answers, rejected, choices)


def compare(a: Measured, b: Measured, direction: str) -> Comparison:
    """Paired comparison of the hits at 1 of two models, queries matched by their ids.

    Raises:
        DataError: the models were not asked the same queries.
    """
    first, second = a.whole[direction], b.whole[direction]
    if first.queries != second.queries:
        different = set(first.queries) ^ set(second.queries)
        raise DataError(f"{len(different)} queries were asked of one model only, e.g. '{min(different)}'")
    return compare_paired(first.hits(), second.hits(), first.groups)


def write_ranks(measured: Measured, path: Path) -> None:
    """Write the rank of every query as a Parquet `direction, query, group, rank, ties, average_precision`."""
    tables = [
        pa.table(
            {
                "direction": [direction] * len(answers.queries),
                "query": list(answers.queries),
                "group": answers.groups,
                "rank": answers.ranks.rank.numpy(),
                "ties": answers.ranks.ties.numpy(),
                "average_precision": answers.ranks.average_precision.numpy(),
            }
        )
        for direction, answers in measured.whole.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), path)


def source_dataset(
    source: Source, pieces: list[Piece], quarantine: Any, captions_per_image: int | None, kinds: Sequence[str] = ()
) -> Dataset:
    """The usable rows of a source as a Ray dataset: `id`, `image` bytes, `captions`, at most so many a row, and hard
    negatives of these of some kinds, each in a column; where there is none, the caption stands there itself."""
    schema = ROWS_SCHEMA
    for kind in kinds:
        schema = schema.append(pa.field(kind, pa.list_(pa.string())))

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        for number in batch["piece"]:
            for row in source.read(pieces[number]):
                if row.problem:
                    ray.get(quarantine.add.remote({row.id: row.problem}))
                    continue
                captions = row.captions[:captions_per_image]
                negatives = {kind: [_negative(kind, row.id, *item) for item in enumerate(captions)] for kind in kinds}
                rows.append({"id": row.id, "image": row.image, "captions": captions, **negatives})
                if len(rows) == ROWS_AT_ONCE:
                    yield pa.Table.from_pylist(rows, schema)
                    rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema)

    numbers = ray.data.from_items([{"piece": number} for number in range(len(pieces))], override_num_blocks=len(pieces))
    return numbers.map_batches(read, batch_size=1)


def _negative(kind: str, row: str, number: int, caption: str) -> str:
    return hard_negative(kind, caption, f"{row}#{number}", load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH)) or caption


def _choices(images: torch.Tensor, rows: list[dict[str, Any]], kind: str) -> Choices:
    margins, groups, texts = [], [], 0
    for number, (image, row) in enumerate(zip(images.numpy(), rows, strict=True)):
        differ = np.array(
            [one != other for one, other in zip(cell_texts(row["captions"]), cell_texts(row[kind]), strict=True)]
        )
        found = (row[f"{WHOLE}_embedding"] - row[f"{kind}_embedding"])[differ] @ image
        margins.append(found)
        groups += [number] * len(found)
        texts += len(differ)
    return Choices(np.concatenate(margins), np.array(groups, np.int64), texts)


def _retrieval(ids: list[str], images: torch.Tensor, parts: list[np.ndarray]) -> dict[str, Answers]:
    image_of_text = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    ranks = retrieval_ranks(images, torch.from_numpy(np.concatenate(parts)), image_of_text)
    texts = tuple(f"{key}#{number}" for key, part in zip(ids, parts, strict=True) for number in range(len(part)))
    return {
        "text_to_image": Answers(ranks["text_to_image"], texts, image_of_text.numpy()),
        "image_to_text": Answers(ranks["image_to_text"], tuple(ids), np.arange(len(ids))),
    }
