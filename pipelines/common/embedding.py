"""Embedding rows of a Parquet with a checkpoint, over Ray Data."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset

from longclip.checkpoint import Checkpoint, load_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.errors import CheckpointError
from longclip.text.perturbations import changer
from longclip.tokenizer import tokenize
from pipelines.common.model_inputs import ModelInputs, cell_texts
from pipelines.common.rejected_rows import Columns
from pipelines.common.workers import Workers

BATCH_SIZE = 128


@dataclass(frozen=True)
class Reading:
    """One way of reading a column of texts."""

    column: str
    context_length: int | None = None
    """Most tokens that are read, start and end token included; as many as the model reads where None."""
    change: str | None = None
    """What is done to the texts before (see `longclip.text.perturbations.changer`)."""


def embed_dataset(
    dataset: Dataset,
    checkpoint: Checkpoint,
    source: str,
    columns: Columns,
    quarantine: Any,
    texts: Mapping[str, Reading] | None = None,
    keep: Sequence[str] = (),
    workers: Workers = Workers(),  # noqa: B008  immutable
) -> Dataset:
    """Embed the image, and any text columns, of every row.

    Args:
        dataset: rows with id, image, `texts` and `keep` columns.
        checkpoint: the model's transform is used for decoding, in tasks beside the actors that hold the model.
        source: where each actor loads the same checkpoint from.
        columns: names of the id and image columns.
        quarantine: handle that takes rows that cannot be used.
        texts: readings of columns of strings or lists of strings. They are cut to what the model reads, as CLIP users
            do.
        keep: columns to hand on.
        workers: actors that hold the model.

    Returns:
        Rows with the id, `keep`, `image_embedding [D]` and, for each reading, `<name>_embedding [k, D]` of its k texts,
        all unit-length float32, and `<name>_cut`, how many of them were longer than what was read.
    """
    texts = texts or {}
    columns_of_texts = list(dict.fromkeys(reading.column for reading in texts.values()))
    handed_on = list(dict.fromkeys([columns.id, *columns_of_texts, *keep]))
    decode = ModelInputs(columns, {}, checkpoint.transform, None, checkpoint.context_length, quarantine, handed_on)
    return dataset.map_batches(decode, batch_size=BATCH_SIZE).map_batches(
        EmbedRows,
        fn_constructor_kwargs={"source": source, "key": columns.id, "texts": dict(texts), "keep": list(keep)},
        fn_constructor_args=[quarantine],
        compute=ActorPoolStrategy(size=workers.count),
        batch_size=BATCH_SIZE,
        **workers.resources,
    )


class EmbedRows:
    """An actor that holds a model and embeds batches of decoded rows."""

    def __init__(self, quarantine: Any, source: str, key: str, texts: dict[str, Reading], keep: list[str]) -> None:
        try:
            self.checkpoint = load_checkpoint(source)
        except CheckpointError as error:
            # The job itself has loaded it from there.
            raise CheckpointError(
                f"machine '{socket.gethostname()}': {error}; on a cluster, set cache to a directory that all nodes see"
            ) from error
        self.checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.quarantine, self.key, self.texts, self.keep = quarantine, key, texts, keep

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Embeddings of a batch; see `embed_dataset`."""
        batch = self._with_texts(batch)
        rows = {name: batch[name] for name in (self.key, *self.keep)}
        model, transform = self.checkpoint.model, self.checkpoint.transform
        dimensions = model.config.projection_dim
        if len(batch[self.key]) == 0:
            return rows | {"image_embedding": np.zeros((0, dimensions), np.float32)}
        pixels = torch.tensor(batch["pixels"], device=model.device)
        rows["image_embedding"] = unit(encode_image(model, transform.normalize(pixels))).cpu().numpy()
        for name, reading in self.texts.items():
            cells = [cell_texts(cell) for cell in batch[reading.column]]
            if reading.change:
                change = changer(reading.change)
                keys = batch[self.key]
                cells = [[change(text, f"{keys[row]}#{n}") for n, text in enumerate(c)] for row, c in enumerate(cells)]
            rows[f"{name}_embedding"], rows[f"{name}_cut"] = self._embed_texts(cells, reading.context_length)
        return rows

    def _with_texts(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows whose text cells all hold a text; the others are rejected."""
        rejected = {}
        good = []
        for row, key in enumerate(batch[self.key]):
            empty = [text.column for text in self.texts.values() if not cell_texts(batch[text.column][row])]
            if empty:
                rejected[str(key)] = f"column '{empty[0]}' holds no text"
            else:
                good.append(row)
        if rejected:
            ray.get(self.quarantine.add.remote(rejected))
        return {name: values[good] for name, values in batch.items()}

    def _embed_texts(self, cells: list[list[str]], context_length: int | None) -> tuple[np.ndarray, np.ndarray]:
        limit = min(context_length or self.checkpoint.context_length, self.checkpoint.context_length)
        tokens = tokenize(self.checkpoint.tokenizer, [text for cell in cells for text in cell], limit)
        embeddings = unit(encode_text(self.checkpoint.model, tokens)).cpu().numpy()
        ends = np.cumsum([len(cell) for cell in cells])
        column = np.empty(len(cells), dtype=object)
        for row, part in enumerate(np.split(embeddings, ends[:-1])):
            column[row] = part
        cut = (tokens.full_lengths > tokens.lengths).numpy()
        return column, np.add.reduceat(cut.astype(np.int64), np.concatenate([[0], ends[:-1]]))
