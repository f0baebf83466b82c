"""The model of a replica: unit-length embeddings of texts and images of many requests at once."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from longclip.checkpoint import Checkpoint
from longclip.encode import encode_image, encode_micro_batch, unit
from longclip.tokenizer import TokenBatch, tokenize
from serving.batching import MicroBatcher

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
BATCH_IMAGES = {"cpu": 8, "cuda": 128}
"""What one run of the model takes. On a CPU larger batches are not faster by the item, but make others wait."""
CACHED_TEXTS = 16384

Precision = Literal["float32", "bfloat16"]


class Embedder:
    """A model that answers many requests: batched, on a thread of its own, with the latest texts remembered."""

    def __init__(self, checkpoint: Checkpoint, torch_threads: int, precision: Precision | None = None) -> None:
        """Take the model over, whose weights are moved, and rounded if the precision asks for that.

        Args:
            checkpoint: the model.
            torch_threads: threads on a CPU.
            precision: of matrix products; by default bfloat16 on a GPU, float32 on a CPU.
        """
        torch.set_num_threads(torch_threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision: Precision = precision or ("bfloat16" if self._device == "cuda" else "float32")
        self._checkpoint = checkpoint
        self._model = checkpoint.model.to(torch.device(self._device))
        if self.precision == "bfloat16":
            for module in self._model.modules():
                if isinstance(module, nn.Linear):
                    module.bfloat16()  # once, where autocast would do it in every run: a fourth of a short text's time
        # One thread: runs of the model share its cores one after the other, not all at once.
        executor = ThreadPoolExecutor(1, "model")
        self.texts = MicroBatcher(self._run_texts, len, BATCH_TOKENS[self._device], executor)
        self.images = MicroBatcher(self._run_images, lambda _: 1, BATCH_IMAGES[self._device], executor)
        self._executor = executor
        self.remembered = 0
        """Texts that were answered without the model."""
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()

    async def embed_texts(self, tokens: TokenBatch) -> np.ndarray:
        """Embeddings `[N, E]` float32 of N texts."""
        rows = [ids[:length] for ids, length in zip(tokens.input_ids, tokens.lengths.tolist(), strict=True)]
        keys = [ids.numpy().tobytes() for ids in rows]
        found = {key: vector for key in dict.fromkeys(keys) if (vector := self._recall(key)) is not None}
        self.remembered += sum(key in found for key in keys)
        missing = {key: ids for key, ids in zip(keys, rows, strict=True) if key not in found}
        if missing:
            for key, vector in zip(missing, await self.texts.submit(list(missing.values())), strict=True):
                found[key] = self._cache[key] = vector
            while len(self._cache) > CACHED_TEXTS:
                self._cache.popitem(last=False)
        return np.stack([found[key] for key in keys])

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings `[N, E]` float32 of pixels `[N, S, S, 3]` uint8."""
        return np.stack(await self.images.submit(list(pixels)))

    async def warm_up(self) -> None:
        """Run the model as requests will, before the first of them: from then on its pace is known, and no flood of
        first requests is let in because it is not."""
        checkpoint = self._checkpoint
        (ids,) = tokenize(checkpoint.tokenizer, ["photo " * checkpoint.tokenizer.model_max_length]).input_ids
        size = checkpoint.transform.image_size
        await asyncio.gather(self.texts.submit([ids]), self.images.submit([np.zeros((size, size, 3), np.uint8)]))

    async def check(self) -> None:
        """Run the model on a text of its own; raises where it cannot.

        It waits for a batch, not for the queue: a model with much to do would look dead, and be replaced for that.
        """
        (ids,) = tokenize(self._checkpoint.tokenizer, ["a photo"]).input_ids
        loop = asyncio.get_running_loop()
        (vector,) = await loop.run_in_executor(self._executor, self._run_texts, [ids])
        if not np.isfinite(vector).all():
            raise RuntimeError("the model's embedding of a text is not finite")

    def _recall(self, key: bytes) -> np.ndarray | None:
        vector = self._cache.get(key)
        if vector is not None:
            self._cache.move_to_end(key)
        return vector

    def _run_texts(self, texts: list[Tensor]) -> Sequence[np.ndarray]:
        lengths = torch.tensor([len(ids) for ids in texts])
        batch = TokenBatch(pad_sequence(texts, batch_first=True), lengths, lengths)
        with torch.inference_mode(), self._autocast():
            return list(unit(encode_micro_batch(self._model, batch, torch.arange(len(batch)))).cpu().numpy())

    def _run_images(self, images: list[np.ndarray]) -> Sequence[np.ndarray]:
        pixels = torch.from_numpy(np.stack(images)).to(self._model.device)
        with torch.inference_mode(), self._autocast():
            return list(unit(encode_image(self._model, self._checkpoint.transform.normalize(pixels))).cpu().numpy())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self.precision == "bfloat16")
