"""From raw rows to what a model eats: uint8 pixels and token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from longclip.errors import ImageError
from longclip.images import ImageTransform
from longclip.tokenizer import load_tokenizer, tokenize
from pipelines.records import Columns


class ModelInputs:
    """Turns raw rows into what a model eats: uint8 pixels and padded token ids.

    Call it on batches of Ray Data in tasks: it holds names only, and each process loads the tokenizer once.
    """

    def __init__(
        self,
        columns: Columns,
        texts: Sequence[str],
        transform: ImageTransform | None,
        tokenizer_source: str | None,
        context_length: int,
        quarantine: Any,
        keep: Sequence[str] = (),
    ) -> None:
        """
        Args:
            columns: names of the columns.
            texts: text columns to tokenize.
            transform: image transform; None leaves the image out.
            tokenizer_source: checkpoint whose tokenizer is used; None takes the one that ships with `longclip`.
            context_length: most tokens of a text.
            quarantine: handle of a `Quarantine` actor.
            keep: further columns to hand on unchanged.
        """
        self.columns, self.texts, self.transform = columns, list(texts), transform
        self.tokenizer_source, self.context_length = tokenizer_source, context_length
        self.quarantine, self.keep = quarantine, list(keep)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows that can be used, with `pixels [n, S, S, 3]` uint8 and, of each text column, `<column>_ids
        [n, context_length]`, `<column>_lengths` and `<column>_full_lengths`."""
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
        for name in self.texts:
            inputs |= self._tokens(name, [str(batch[name][row]) for row in good])
        return inputs

    def _reject_text(self, batch: dict[str, np.ndarray], row: int) -> str | None:
        for name in self.texts:
            text = batch[name][row]
            if not isinstance(text, str) or not text.strip():
                return f"column '{name}' holds no text"
        return None

    def _tokens(self, name: str, texts: list[str]) -> dict[str, np.ndarray]:
        ids = np.zeros((len(texts), self.context_length), np.int32)
        lengths = np.zeros((2, len(texts)), np.int32)
        if texts:
            tokens = tokenize(load_tokenizer(self.tokenizer_source, self.context_length), texts, self.context_length)
            ids[:, : tokens.input_ids.shape[1]] = tokens.input_ids.numpy()
            lengths[0], lengths[1] = tokens.lengths.numpy(), tokens.full_lengths.numpy()
        return {f"{name}_ids": ids, f"{name}_lengths": lengths[0], f"{name}_full_lengths": lengths[1]}


def image_bytes(value: Any) -> bytes:
    """Bytes of an image cell: binary, or the `{bytes, path}` struct of Hugging Face datasets."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes | bytearray) or not value:
        raise ImageError("image cell holds no bytes")
    return bytes(value)
