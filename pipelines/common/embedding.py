"""Embedding the rows of a Parquet with a checkpoint: CPU tasks decode and tokenize, actors run the model."""

import io
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from longclip.checkpoint import Checkpoint, load_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.errors import CheckpointError
from longclip.images import ImageTransform
from longclip.text.perturbations import CHANGES
from longclip.tokenizer import TokenBatch, load_tokenizer, tokenize
from pipelines.common.columns import Columns, image_bytes
from pipelines.common.model_inputs import require_texts, stack_pixels, usable_rows
from pipelines.common.workers import Workers

BATCH_SIZE = 128
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Reading:
    """How one column of texts is read."""

    column: str
    context_length: int | None = None
    """Maximum tokens of a text, including the start and end tokens; None for the maximum of the model."""
    change: str | None = None
    """Perturbation applied to each text before it is tokenized: a name in `longclip.text.perturbations.CHANGES`."""
    draw: int = 0
    """Number of the draw of a random perturbation."""
    max_texts: int | None = None
    """Maximum texts of a cell; None for all of them."""


def embed_dataset(
    dataset: Dataset,
    checkpoint: Checkpoint,
    source: str,
    columns: Columns,
    quarantine: Any,
    readings: Mapping[str, Reading],
    keep: Sequence[str] = (),
    thumbnail_side: int | None = None,
    workers: Workers = Workers(),  # noqa: B008  immutable
) -> Dataset:
    """Embed the image, and any text columns, of every row.

    Args:
        dataset: rows with the id, the image, and the columns of `readings` and `keep`.
        checkpoint: gives the image transform and the context length.
        source: where every process loads the tokenizer or the model of that checkpoint from.
        columns: names of the id and image columns.
        quarantine: handle of a `Quarantine` actor, for rows that cannot be used.
        readings: which text columns to embed, and how, by the name of the result. A cell holds one text or a list.
        keep: columns to pass through.
        thumbnail_side: also make a JPEG `thumbnail` of the image, with sides of at most that many pixels.
        workers: actors that hold the model.

    Returns:
        Rows with the id, `keep`, `thumbnail` if asked for, `image_embedding [D]` and, for each reading of a cell with k
        texts, `<name>_embedding [k, D]` and `<name>_cut`, how many of the texts were truncated; for a reading with a
        change also `<name>_unchanged`, how many were too short for it. Embeddings are float32 vectors of length 1.
    """
    kept = list(dict.fromkeys([columns.id, *keep]))
    inputs = EmbeddingInputs(
        columns, checkpoint.transform, source, checkpoint.context_length, quarantine, readings, kept, thumbnail_side
    )
    made = [f"{name}_cut" for name in readings] + (["thumbnail"] if thumbnail_side else [])
    made += [f"{name}_unchanged" for name, reading in readings.items() if reading.change]
    arguments = (source, list(readings), kept + made)
    if workers.use_gpu:
        return dataset.map_batches(inputs, batch_size=BATCH_SIZE).map_batches(
            EmbedRows,
            fn_constructor_args=arguments,
            compute=ActorPoolStrategy(size=workers.count),
            batch_size=BATCH_SIZE,
            **workers.resources,
        )
    # On CPUs the same tasks decode and encode, in processes that the next dataset of the job uses again.
    tasks = {"compute": TaskPoolStrategy(size=workers.count), "batch_size": BATCH_SIZE, **workers.resources}
    return dataset.map_batches(inputs, **tasks).map_batches(EmbedRows(*arguments), **tasks)


class EmbeddingInputs:
    """Decodes the image and tokenizes the texts of each row; runs in CPU tasks."""

    def __init__(
        self,
        columns: Columns,
        transform: ImageTransform,
        tokenizer_source: str,
        context_length: int,
        quarantine: Any,
        readings: Mapping[str, Reading],
        keep: Sequence[str],
        thumbnail_side: int | None,
    ) -> None:
        """The arguments are those of `embed_dataset`."""
        self.columns, self.transform, self.quarantine = columns, transform, quarantine
        self.tokenizer_source, self.context_length = tokenizer_source, context_length
        self.readings, self.keep, self.thumbnail_side = dict(readings), keep, thumbnail_side

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Rows that can be used.

        Returns:
            The `keep` columns, `pixels [n, S, S, 3]` uint8, `thumbnail` if asked for, and for each reading of a cell
            with k texts: `<name>_ids`, int32 tokens of the k texts one after the other, `<name>_lengths [k]`, and
            `<name>_cut`, how many texts were truncated, and for a reading with a change `<name>_unchanged`, how many
            were too short for it.
        """
        keys = batch[self.columns.id]
        usable, images = usable_rows(keys, self.quarantine, lambda row: self._image(batch, row))
        inputs: dict[str, Any] = {name: _lists(batch[name][usable]) for name in self.keep}
        inputs["pixels"] = stack_pixels([pixels for pixels, _ in images], self.transform)
        if self.thumbnail_side:
            inputs["thumbnail"] = object_column([thumbnail for _, thumbnail in images])
        for name, reading in self.readings.items():
            cells = [require_texts(batch, reading.column, row)[: reading.max_texts] for row in usable]
            inputs |= self._tokens(name, reading, [str(keys[row]) for row in usable], cells)
        return inputs

    def _image(self, batch: dict[str, np.ndarray], row: int) -> tuple[np.ndarray, bytes]:
        for reading in self.readings.values():
            require_texts(batch, reading.column, row)
        data = image_bytes(batch[self.columns.image][row])
        if self.thumbnail_side is None:
            return self.transform.pixels(data), b""
        pixels, image = self.transform.pixels_and_image(data)
        return pixels, _thumbnail(image, self.thumbnail_side)

    def _tokens(self, name: str, reading: Reading, keys: list[str], cells: list[list[str]]) -> dict[str, np.ndarray]:
        unchanged: dict[str, np.ndarray] = {}
        if reading.change:
            changed = [_changed(reading.change, reading.draw, *pair) for pair in zip(keys, cells, strict=True)]
            unchanged = {f"{name}_unchanged": np.array([cell.count(None) for cell in changed], np.int64)}
            pairs = zip(changed, cells, strict=True)
            cells = [[new or text for new, text in zip(*pair, strict=True)] for pair in pairs]
        ids, lengths, cut = [], [], []
        if cells:
            limit = min(reading.context_length or self.context_length, self.context_length)
            tokenizer = load_on_this_node(lambda: load_tokenizer(self.tokenizer_source, self.context_length))
            tokens = tokenize(tokenizer, [text for cell in cells for text in cell], limit)
            ends = np.cumsum([len(cell) for cell in cells])[:-1].tolist()
            for rows in np.split(np.arange(len(tokens)), ends):
                own_lengths = tokens.lengths[rows].numpy()
                own_ids = [
                    tokens.input_ids[row, :length].numpy() for row, length in zip(rows, own_lengths, strict=True)
                ]
                ids.append(np.concatenate(own_ids).astype(np.int32))
                lengths.append(own_lengths.astype(np.int32))
                cut.append(int((tokens.full_lengths[rows] > tokens.lengths[rows]).sum()))
        return {
            f"{name}_ids": object_column(ids),
            f"{name}_lengths": object_column(lengths),
            f"{name}_cut": np.array(cut, np.int64),
            **unchanged,
        }


class EmbedRows:
    """Encodes what `EmbeddingInputs` returns. A process that calls it holds the model."""

    def __init__(self, source: str, texts: Sequence[str], keep: Sequence[str]) -> None:
        """
        Args:
            source: checkpoint to load.
            texts: names of the readings.
            keep: columns to pass through.
        """
        self.source, self.texts, self.keep = source, texts, keep

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Embeddings of a batch; see `embed_dataset`."""
        rows: dict[str, Any] = {name: _lists(batch[name]) for name in self.keep}
        checkpoint = _held_checkpoint(self.source, _modified(self.source))
        model, transform = checkpoint.model, checkpoint.transform
        if len(batch["pixels"]) == 0:
            return rows | {"image_embedding": np.zeros((0, model.config.projection_dim), np.float32)}
        pixels = torch.tensor(batch["pixels"], device=model.device)
        rows["image_embedding"] = unit(encode_image(model, transform.normalize(pixels))).cpu().numpy()
        texts = {name: _texts(batch[f"{name}_ids"], batch[f"{name}_lengths"]) for name in self.texts}
        # Many readings leave many texts as they are, and equal texts are encoded once.
        distinct = {text.tobytes(): text for name in self.texts for text in texts[name]}
        places = {text: place for place, text in enumerate(distinct)}
        if distinct:
            embeddings = unit(encode_text(model, _token_batch(list(distinct.values())))).cpu().numpy()
        for name in self.texts:
            ends = np.cumsum([len(lengths) for lengths in batch[f"{name}_lengths"]])[:-1]
            of_texts = embeddings[[places[text.tobytes()] for text in texts[name]]]
            rows[f"{name}_embedding"] = object_column(np.split(of_texts, ends))
        return rows


@lru_cache(maxsize=1)
def _held_checkpoint(source: str, modified: int) -> Checkpoint:
    """The checkpoint that this process holds, on its GPU if it has one."""
    checkpoint = load_on_this_node(lambda: load_checkpoint(source))
    checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return checkpoint


def _modified(source: str) -> int:
    """When a directory got the newest of its files, in nanoseconds; 0 for a hub name."""
    return max((file.stat().st_mtime_ns for file in Path(source).glob("*")), default=0)


def _changed(change: str, draw: int, key: str, cell: list[str]) -> list[str | None]:
    """The changed texts of a cell; None for those that are too short for the change."""
    suffix = f"/{draw}" if draw else ""
    return [CHANGES[change].apply(text, f"{key}#{number}{suffix}") for number, text in enumerate(cell)]


def _texts(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The tokens of each text of a column of cells."""
    return [text for cell, ends in zip(ids, lengths, strict=True) for text in np.split(cell, np.cumsum(ends)[:-1])]


def _token_batch(texts: Sequence[np.ndarray]) -> TokenBatch:
    """Texts as one batch; as they were truncated before, `full_lengths` equal `lengths`."""
    lengths = torch.tensor([len(text) for text in texts])
    input_ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    input_ids[torch.arange(input_ids.shape[1]) < lengths[:, None]] = torch.from_numpy(np.concatenate(texts)).long()
    return TokenBatch(input_ids, lengths, lengths)


def _thumbnail(image: Image.Image, side: int) -> bytes:
    """The image, which is shrunk in place to sides of at most `side` pixels, as a JPEG."""
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _lists(column: np.ndarray) -> np.ndarray:
    """A column whose cells may be arrays of texts, with lists instead: Ray would pickle the arrays."""
    if column.dtype != object or not any(isinstance(cell, np.ndarray) for cell in column):
        return column
    return object_column([cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in column])


def object_column(values: Sequence[Any]) -> np.ndarray:
    """`[n]` values of any kind as a column: numpy would make a matrix of arrays of equal lengths."""
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column


def load_on_this_node(load: Callable[[], Loaded]) -> Loaded:
    """Run a loader whose files the job's own process has read already, so only this node can be at fault.

    Raises:
        CheckpointError: it failed; the message names the node.
    """
    try:
        return load()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"machine '{socket.gethostname()}': {error}; on a cluster, set cache to a directory that all nodes see"
        ) from error
