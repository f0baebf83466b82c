"""The deployment that holds the model."""

import asyncio

import numpy as np
import torch
from ray import serve
from torch import Tensor

from longclip.checkpoint import load_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.tokenizer import TokenBatch, concatenate
from serving.artifacts import Model, fetch

MAX_BATCH_CALLS = 16
BATCH_WAIT_S = 0.005
TEXTS_PER_CALL = 64
IMAGES_PER_CALL = 8
"""What the ingress puts into one call: large enough to be worth it, small enough that requests take turns."""


class Embedder:
    """Unit-length embeddings of tokens and pixels. Calls that arrive together share a run of the model."""

    def __init__(self, model: Model, torch_threads: int) -> None:
        torch.set_num_threads(torch_threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = load_checkpoint(fetch(model))
        self._transform = checkpoint.transform
        self._model = checkpoint.model.to(torch.device(device))

    @serve.batch(max_batch_size=MAX_BATCH_CALLS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def embed_texts(self, calls: list[TokenBatch]) -> list[np.ndarray]:
        """Embeddings `[n, E]` float32 of each call's n texts."""
        return await asyncio.to_thread(self._embed_texts, calls)

    @serve.batch(max_batch_size=MAX_BATCH_CALLS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def embed_images(self, calls: list[np.ndarray]) -> list[np.ndarray]:
        """Embeddings `[n, E]` float32 of each call's pixels `[n, S, S, 3]` uint8."""
        return await asyncio.to_thread(self._embed_images, calls)

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    @torch.inference_mode()
    def _embed_texts(self, calls: list[TokenBatch]) -> list[np.ndarray]:
        features = encode_text(self._model, concatenate(calls))
        return _split(unit(features), [len(call) for call in calls])

    @torch.inference_mode()
    def _embed_images(self, calls: list[np.ndarray]) -> list[np.ndarray]:
        lengths = [len(call) for call in calls]
        pixels = torch.from_numpy(np.concatenate(calls))
        features = [
            encode_image(self._model, self._transform.normalize(part.to(self._model.device)))
            for part in pixels.split(IMAGES_PER_CALL)
        ]
        return _split(unit(torch.cat(features)), lengths)


def _split(embeddings: Tensor, lengths: list[int]) -> list[np.ndarray]:
    return [part.numpy() for part in embeddings.cpu().split(lengths)]
