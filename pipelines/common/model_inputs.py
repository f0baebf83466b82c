"""From raw rows to what a model eats: uint8 pixels and token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from longclip.errors import ImageError
from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch, load_tokenizer, tokenize
from pipelines.common.rejected_rows import Columns


class ModelInputs:
    """Turns raw rows into what a model eats: uint8 pixels and padded token ids.

    Call it on batches of Ray Data in tasks: it holds names only, and each process loads the tokenizer once.
    """

    def __init__(
        self,
        columns: Columns,
        texts: Mapping[str, int],
        transform: ImageTransform | None,
        tokenizer_source: str | None,
        context_length: int,
        quarantine: Any,
        keep: Sequence[str] = (),
    ) -> None:
        """
        Args:
            columns: names of the columns.
            texts: text columns to tokenize, and how many texts of a cell that is a list are handed on.
            transform: image transform; None leaves the image out.
            tokenizer_source: checkpoint whose tokenizer is used; None takes the one that ships with `longclip`.
            context_length: most tokens of a text.
            quarantine: handle of a `Quarantine` actor.
            keep: further columns to hand on unchanged.
        """
        self.columns, self.texts, self.transform = columns, dict(texts), transform
        self.tokenizer_source, self.context_length = tokenizer_source, context_length
        self.quarantine, self.keep = quarantine, list(keep)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows that can be used.

        Returns:
            `pixels [n, S, S, 3]` uint8; of each text column, the tokens of its first k texts: `<column>_ids
            [n, k, context_length]`, `<column>_lengths` and `<column>_full_lengths` `[n, k]`, and how many of them
            differ: `<column>_count [n]`; with any texts, `row_key [n]`, a number that depends on the id alone.
        """
        good: list[int] = []
        pixels: list[np.ndarray] = []
        rejected: dict[str, str] = {}
        for row, key in enumerate(batch[self.columns.id]):
            reason = self._reject_text(batch, row)
            if reason is None and self.transform is not None:
                try:
                    pixels.append(self.transform.pixels(image_bytes(batch[self.columns.image][row])))
                except ImageError as error:
                    reason = str(error)
            if reason is None:
                good.append(row)
            else:
                rejected[str(key)] = reason
        if rejected:
            ray.get(self.quarantine.add.remote(rejected))
        inputs = {name: batch[name][good] for name in self.keep}
        if self.transform is not None:
            side = self.transform.image_size
            inputs["pixels"] = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8)
        for name, most in self.texts.items():
            inputs |= self._tokens(name, most, [cell_texts(batch[name][row]) for row in good])
        if self.texts:
            inputs["row_key"] = np.array([row_key(batch[self.columns.id][row]) for row in good], np.int64)
        return inputs

    def _reject_text(self, batch: dict[str, np.ndarray], row: int) -> str | None:
        empty = [name for name in self.texts if not cell_texts(batch[name][row])]
        return f"column '{empty[0]}' holds no text" if empty else None

    def _tokens(self, name: str, most: int, cells: list[list[str]]) -> dict[str, np.ndarray]:
        # Cells with fewer texts repeat them, so that all rows have the same shape.
        texts = [cell[place % min(len(cell), most)] for cell in cells for place in range(most)]
        ids = np.zeros((len(texts), self.context_length), np.int32)
        lengths = np.zeros((2, len(texts)), np.int32)
        if texts:
            tokens = tokenize(load_tokenizer(self.tokenizer_source, self.context_length), texts, self.context_length)
            ids[:, : tokens.input_ids.shape[1]] = tokens.input_ids.numpy()
            lengths[0], lengths[1] = tokens.lengths.numpy(), tokens.full_lengths.numpy()
        return {
            f"{name}_ids": ids.reshape(len(cells), most, self.context_length),
            f"{name}_lengths": lengths[0].reshape(len(cells), most),
            f"{name}_full_lengths": lengths[1].reshape(len(cells), most),
            f"{name}_count": np.array([min(len(cell), most) for cell in cells], np.int64),
        }


def chosen_texts(columns: Mapping[str, Tensor], name: str, places: Tensor) -> TokenBatch:
    """Of the candidate texts of each row in a batch, as `ModelInputs` hands them on, the one at its place `[n]`."""
    rows = torch.arange(len(places))
    ids, lengths, full = (columns[f"{name}_{part}"][rows, places].long() for part in ("ids", "lengths", "full_lengths"))
    return TokenBatch(ids, lengths, full)


def cell_texts(cell: Any) -> list[str]:
    """The texts of a cell that holds one text or several; empty ones are left out."""
    texts = [cell] if isinstance(cell, str) else list(cell) if cell is not None else []
    return [text for text in texts if isinstance(text, str) and text.strip()]


def row_key(row: Any) -> int:
    """A non-negative 63-bit number of a row's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(str(row).encode()).digest()[:8], "big") >> 1


def image_bytes(value: Any) -> bytes:
    """Bytes of an image cell: binary, or the `{bytes, path}` struct of Hugging Face datasets."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes | bytearray) or not value:
        raise ImageError("image cell holds no bytes")
    return bytes(value)
