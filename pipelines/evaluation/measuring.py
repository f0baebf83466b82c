"""Measuring a model on a task: embed its images and texts over Ray Data, and rank every query."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from upath import UPath

from longclip.checkpoint import Checkpoint, load_checkpoint
from longclip.constants import CLIP_CONTEXT_LENGTH, KEPT_POSITIONS, LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import DataError
from longclip.evaluation.metrics import classification_ranks, retrieval_ranks
from longclip.text.perturbations import KINDS
from longclip.zero_shot import class_embeddings
from pipelines.common.columns import Columns, cell_texts
from pipelines.common.embedding import Reading, embed_dataset
from pipelines.common.rejected_rows import start_quarantine
from pipelines.common.workers import Workers
from pipelines.evaluation.measured import WHOLE, Answers, Choices, Measured
from pipelines.evaluation.perturbed import perturbed_readings
from pipelines.evaluation.questions.monotonicity import PREFIXES, growth_scores
from pipelines.evaluation.questions.rows import Embedded
from pipelines.evaluation.rows import source_dataset
from pipelines.evaluation.scores import Score
from pipelines.evaluation.tasks import Task, label_classes, templates_of

CUTS = (10, KEPT_POSITIONS, 40, CLIP_CONTEXT_LENGTH, 128, LONG_CLIP_CONTEXT_LENGTH)
"""Maximum tokens at which long texts are cut, to see up to which length more text helps."""


def readings(task: Task, context_length: int, long_text: bool, draws: int) -> dict[str, Reading]:
    """How the texts of a task are read.

    Args:
        task: the task.
        context_length: of the model; cuts at it or above it are left out.
        long_text: also read cut and perturbed texts and hard negatives, on tasks with long texts.
        draws: how many times random perturbations are drawn.
    """
    if task.is_zero_shot:
        return {}
    plain = {WHOLE: Reading("captions")}
    if not long_text or task.protocol.text != "long":
        return plain
    prefixes = {name: Reading(name) for name in PREFIXES}
    cuts = {f"cut_{cut}": Reading("captions", context_length=cut) for cut in CUTS if cut < context_length}
    return plain | cuts | perturbed_readings(draws) | prefixes | {kind: Reading(kind) for kind in KINDS}


def measure(
    model: str, task: Task, scratch: UPath, max_rejected_fraction: float, workers: Workers, long_text: bool, draws: int
) -> Measured:
    """Embed the images and texts of a task with a model, and rank them.

    Args:
        model: argument of `load_checkpoint`.
        task: the task.
        scratch: existing directory that all nodes share.
        max_rejected_fraction: maximum share of unusable rows.
        workers: actors that hold the model.
        long_text: see `readings`.
        draws: see `readings`.

    Raises:
        DataError: too many rows are unusable, ids are not unique, or the counts are not the protocol's.
    """
    checkpoint = load_checkpoint(model)
    text_readings = readings(task, checkpoint.context_length, long_text, draws)
    kinds = [kind for kind in KINDS if kind in text_readings]
    derived = [name for name in (*kinds, *PREFIXES) if name in text_readings]
    pieces = task.source.pieces(scratch)
    quarantine = start_quarantine(sum(piece.rows or 0 for piece in pieces), max_rejected_fraction)
    rows = embed_dataset(
        source_dataset(task.source, pieces, quarantine, task.protocol.captions_per_image, derived),
        checkpoint,
        model,
        Columns(),
        quarantine,
        text_readings,
        keep=["captions", *derived] if task.is_zero_shot or derived else [],
        workers=workers,
    ).take_all()
    rows.sort(key=lambda row: row["id"])  # Ray Data keeps no order
    ids = _unique_ids(task, rows)
    texts = None if task.is_zero_shot else sum(len(row[f"{WHOLE}_embedding"]) for row in rows)
    if not ids:
        raise DataError(f"tasks.{task.name}.input has no usable row")
    scores = _scores(task, rows, [name for name in PREFIXES if name in derived])
    protocol = task.check_counts(len(ids), texts, {name: len(score.values) for name, score in scores.items()})
    images = torch.from_numpy(np.stack([row["image_embedding"] for row in rows]))
    if task.questions is not None:
        answers: dict[str, dict[str, Answers]] = {WHOLE: {}}
    elif task.is_zero_shot:
        answers = {WHOLE: _zero_shot(task, checkpoint, ids, images, [row["captions"][0] for row in rows])}
    else:
        names = [name for name in text_readings if name not in derived]
        answers = {name: _retrieval(ids, images, [row[f"{name}_embedding"] for row in rows]) for name in names}
    return Measured(
        protocol=protocol,
        context_length=checkpoint.context_length,
        images=len(ids),
        texts=texts,
        texts_cut=sum(int(row[f"{WHOLE}_cut"]) for row in rows) if texts else 0,
        answers=answers,
        rejected=ray.get(quarantine.reasons.remote()),
        unchanged={
            reading.change: sum(int(row[f"{name}_unchanged"]) for row in rows)
            for name, reading in text_readings.items()
            if reading.change and reading.draw == 0
        },
        choices={kind: choices for kind in kinds if len((choices := _choices(images, rows, kind)).margins)},
        scores=scores,
    )


def _scores(task: Task, rows: Sequence[dict[str, Any]], prefixes: Sequence[str]) -> dict[str, Score]:
    """Scores of the questions of a task, or of the growth of similarity from prefixes to captions."""
    if task.questions is not None:
        embedded = {row["id"]: Embedded(row["image_embedding"], row[f"{WHOLE}_embedding"]) for row in rows}
        return task.questions.scores(embedded)
    if not prefixes:
        return {}
    counts = [len(row[f"{WHOLE}_embedding"]) for row in rows]
    similarities = {
        name: np.concatenate([row[f"{name}_embedding"] @ row["image_embedding"] for row in rows])
        for name in (*prefixes, WHOLE)
    }
    applies = {name: np.concatenate([_differs(row, name) for row in rows]) for name in prefixes}
    queries = [f"{row['id']}#{number}" for row, count in zip(rows, counts, strict=True) for number in range(count)]
    return growth_scores(similarities, applies, queries, np.repeat(np.arange(len(rows)), counts))


def _differs(row: dict[str, Any], name: str) -> np.ndarray:
    """Whether the derived text of each caption of a row is another one."""
    pairs = zip(cell_texts(row["captions"]), cell_texts(row[name]), strict=True)
    return np.array([caption != derived for caption, derived in pairs])


def _unique_ids(task: Task, rows: Sequence[dict[str, Any]]) -> list[str]:
    ids = [row["id"] for row in rows]
    duplicate = next((key for before, key in pairwise(ids) if before == key), None)
    if duplicate is not None:
        raise DataError(
            f"tasks.{task.name}.input: id '{duplicate}' occurs more than once; name a unique column with source.id"
        )
    return ids


def _zero_shot(
    task: Task, checkpoint: Checkpoint, ids: list[str], images: torch.Tensor, labels: list[str]
) -> dict[str, Answers]:
    names, numbers = label_classes(task, labels)
    classes = class_embeddings(checkpoint, names, templates_of(task))
    ranks = classification_ranks(images, classes, torch.tensor(numbers))
    return {"image_to_class": Answers(ranks, tuple(ids), np.arange(len(ids)))}


def _retrieval(ids: list[str], images: torch.Tensor, parts: list[np.ndarray]) -> dict[str, Answers]:
    image_of_text = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    ranks = retrieval_ranks(images, torch.from_numpy(np.concatenate(parts)), image_of_text)
    texts = tuple(f"{key}#{number}" for key, part in zip(ids, parts, strict=True) for number in range(len(part)))
    return {
        "text_to_image": Answers(ranks["text_to_image"], texts, image_of_text.numpy()),
        "image_to_text": Answers(ranks["image_to_text"], tuple(ids), np.arange(len(ids))),
    }


def _choices(images: torch.Tensor, rows: list[dict[str, Any]], kind: str) -> Choices:
    margins, groups, texts = [], [], 0
    for number, (image, row) in enumerate(zip(images.numpy(), rows, strict=True)):
        differ = _differs(row, kind)
        scores = (row[f"{WHOLE}_embedding"] - row[f"{kind}_embedding"])[differ] @ image
        margins.append(scores)
        groups += [number] * len(scores)
        texts += len(differ)
    return Choices(np.concatenate(margins), np.array(groups, np.int64), texts)
