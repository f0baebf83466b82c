"""The model of a replica: unit-length embeddings of texts and images, batched over requests."""

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
"""Maximum size of a batch. On a CPU, larger batches increase latency without increasing throughput."""
CACHED_TEXTS = 16384

Precision = Literal["float32", "bfloat16"]


class Embedder:
    """A model that serves many requests: batched, on a dedicated thread, with a cache of recent text embeddings."""

    def __init__(self, checkpoint: Checkpoint, torch_threads: int, precision: Precision | None = None) -> None:
        """Takes ownership of the model: its weights are moved to the device and may be converted to bfloat16.

        Args:
            checkpoint: the model.
            torch_threads: number of CPU threads.
            precision: precision of matrix products; None is bfloat16 on a GPU and float32 on a CPU.
        """
        torch.set_num_threads(torch_threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision: Precision = precision or ("bfloat16" if self._device == "cuda" else "float32")
        self._checkpoint = checkpoint
        self._model = checkpoint.model.to(torch.device(self._device))
        if self.precision == "bfloat16":
            for module in self._model.modules():
                if isinstance(module, nn.Linear):
                    module.bfloat16()  # autocast would convert in every run, a quarter of a short text's time
        # A single thread, so that concurrent runs do not compete for the CPU cores.
        executor = ThreadPoolExecutor(1, "model")
        self.texts = MicroBatcher(self._run_texts, len, BATCH_TOKENS[self._device], executor)
        self.images = MicroBatcher(self._run_images, lambda _: 1, BATCH_IMAGES[self._device], executor)
        self._executor = executor
        self.cache_hits = 0
        """Number of texts whose embedding came from the cache."""
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()

    async def embed_texts(self, tokens: TokenBatch) -> np.ndarray:
        """Embeddings `[N, E]` float32 of N texts."""
        rows = [ids[:length] for ids, length in zip(tokens.input_ids, tokens.lengths.tolist(), strict=True)]
        keys = [ids.numpy().tobytes() for ids in rows]
        vectors = {key: vector for key in dict.fromkeys(keys) if (vector := self._cached(key)) is not None}
        self.cache_hits += sum(key in vectors for key in keys)
        missing = {key: ids for key, ids in zip(keys, rows, strict=True) if key not in vectors}
        if missing:
            for key, vector in zip(missing, await self.texts.submit(list(missing.values())), strict=True):
                vectors[key] = self._cache[key] = vector
            while len(self._cache) > CACHED_TEXTS:
                self._cache.popitem(last=False)
        return np.stack([vectors[key] for key in keys])

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings `[N, E]` float32 of pixels `[N, S, S, 3]` uint8."""
        return np.stack(await self.images.submit(list(pixels)))

    async def warm_up(self) -> None:
        """Run the model once on a text and an image of maximum size.

        This measures the speed of both queues before the first request. Without it, an initial burst of any size would
        be accepted.
        """
        checkpoint = self._checkpoint
        (ids,) = tokenize(checkpoint.tokenizer, ["photo " * checkpoint.tokenizer.model_max_length]).input_ids
        size = checkpoint.transform.image_size
        await asyncio.gather(self.texts.submit([ids]), self.images.submit([np.zeros((size, size, 3), np.uint8)]))

    async def check(self) -> None:
        """Run the model on a short text; raises an exception if that fails.

        Waits for the current batch but not for the queue: otherwise a busy model would look dead and be replaced.
        """
        (ids,) = tokenize(self._checkpoint.tokenizer, ["a photo"]).input_ids
        loop = asyncio.get_running_loop()
        (vector,) = await loop.run_in_executor(self._executor, self._run_texts, [ids])
        if not np.isfinite(vector).all():
            raise RuntimeError("the model's embedding of a text is not finite")

    def _cached(self, key: bytes) -> np.ndarray | None:
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
