"""From raw rows to the inputs of a model: uint8 pixels and token ids."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from torch import Tensor

from longclip.errors import DataError
from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch, load_tokenizer, tokenize
from pipelines.common.columns import Columns, cell_texts, image_bytes

Read = TypeVar("Read")


class ModelInputs:
    """Turns raw rows into the inputs of a model: uint8 pixels and padded token ids.

    For `map_batches` of Ray Data: it is cheap to pickle, and each process loads the tokenizer once.
    """

    def __init__(
        self,
        columns: Columns,
        texts: Mapping[str, int],
        transform: ImageTransform,
        tokenizer_source: str | None,
        context_length: int,
        quarantine: Any,
        keep: Sequence[str] = (),
    ) -> None:
        """
        Args:
            columns: names of the columns.
            texts: text columns to tokenize, and the maximum number of texts to use of a cell that is a list.
            transform: image transform of the model.
            tokenizer_source: checkpoint of the tokenizer; None: the one that ships with `longclip`.
            context_length: maximum number of tokens of a text.
            quarantine: handle of a `Quarantine` actor.
            keep: further columns to pass on unchanged.
        """
        self.columns, self.texts, self.transform = columns, dict(texts), transform
        self.tokenizer_source, self.context_length = tokenizer_source, context_length
        self.quarantine, self.keep = quarantine, list(keep)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs of the rows that can be used; the other rows are quarantined.

        Returns:
            `pixels [n, S, S, 3]` uint8. For each text column, the tokens of its first k texts: `<column>_ids
            [n, k, context_length]`, `<column>_lengths` and `<column>_full_lengths` `[n, k]`, and the number of distinct
            texts, `<column>_count [n]`. With any text column, `row_key [n]`, a number that depends only on the id.
        """
        good, pixels = usable_rows(batch[self.columns.id], self.quarantine, lambda row: self._pixels(batch, row))
        inputs = {name: batch[name][good] for name in self.keep} | {"pixels": stack_pixels(pixels, self.transform)}
        for name, max_texts in self.texts.items():
            inputs |= self._tokens(name, max_texts, [cell_texts(batch[name][row]) for row in good])
        if self.texts:
            inputs["row_key"] = np.array([row_key(batch[self.columns.id][row]) for row in good], np.int64)
        return inputs

    def _pixels(self, batch: dict[str, np.ndarray], row: int) -> np.ndarray:
        for name in self.texts:
            require_texts(batch, name, row)
        return self.transform.pixels(image_bytes(batch[self.columns.image][row]))

    def _tokens(self, name: str, max_texts: int, cells: list[list[str]]) -> dict[str, np.ndarray]:
        # Cells with fewer texts repeat them, so that all rows have the same shape.
        texts = [cell[slot % min(len(cell), max_texts)] for cell in cells for slot in range(max_texts)]
        ids = np.zeros((len(texts), self.context_length), np.int32)
        lengths = np.zeros((2, len(texts)), np.int32)
        if texts:
            tokens = tokenize(load_tokenizer(self.tokenizer_source, self.context_length), texts, self.context_length)
            ids[:, : tokens.input_ids.shape[1]] = tokens.input_ids.numpy()
            lengths[0], lengths[1] = tokens.lengths.numpy(), tokens.full_lengths.numpy()
        return {
            f"{name}_ids": ids.reshape(len(cells), max_texts, self.context_length),
            f"{name}_lengths": lengths[0].reshape(len(cells), max_texts),
            f"{name}_full_lengths": lengths[1].reshape(len(cells), max_texts),
            f"{name}_count": np.array([min(len(cell), max_texts) for cell in cells], np.int64),
        }


def usable_rows(keys: Iterable[Any], quarantine: Any, read: Callable[[int], Read]) -> tuple[list[int], list[Read]]:
    """Rows of a batch that can be used, and what `read` returns for each; the other rows are quarantined.

    Args:
        keys: id of each row.
        quarantine: handle of a `Quarantine` actor.
        read: called with the position of a row; raises `DataError` with the reason if the row cannot be used.
    """
    usable: list[int] = []
    values: list[Read] = []
    rejected: dict[str, str] = {}
    for row, key in enumerate(keys):
        try:
            values.append(read(row))
            usable.append(row)
        except DataError as error:
            rejected[str(key)] = str(error)
    if rejected:
        ray.get(quarantine.add.remote(rejected))
    return usable, values


def require_texts(batch: dict[str, np.ndarray], column: str, row: int) -> list[str]:
    """The texts of a cell; raises `DataError` if there are none."""
    texts = cell_texts(batch[column][row])
    if not texts:
        raise DataError(f"column '{column}' has no text")
    return texts


def stack_pixels(pixels: Sequence[np.ndarray], transform: ImageTransform) -> np.ndarray:
    """Images of a batch as one array `[n, S, S, 3]` uint8; n may be 0."""
    side = transform.image_size
    return np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8)


def chosen_texts(columns: Mapping[str, Tensor], name: str, choices: Tensor) -> TokenBatch:
    """For each row of a batch from `ModelInputs`, the text number `choices [n]` among the texts of a column."""
    rows = torch.arange(len(choices))
    ids, lengths, full_lengths = (
        columns[f"{name}_{part}"][rows, choices].long() for part in ("ids", "lengths", "full_lengths")
    )
    return TokenBatch(ids, lengths, full_lengths)


def row_key(row: Any) -> int:
    """A non-negative 63-bit hash of a row's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(str(row).encode()).digest()[:8], "big") >> 1
