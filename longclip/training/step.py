"""One training step of Long-CLIP: features of a batch, losses over the whole of it, gradients in the parameters.

It needs no Ray. With `PairEncoder` in a `DistributedDataParallel`, several processes get the gradients that one process
would have on the whole batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel

from longclip.encode import (
    TEXT_MICRO_BATCH,
    at_least_float32,
    encode_image,
    encode_micro_batch,
    inverse_order,
    text_micro_batches,
    unit,
)
from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch, concatenate
from longclip.training.freeze import is_locked
from longclip.training.gradcache import cached_backward
from longclip.training.loss import LossConfig, long_clip_losses

LEAST_MICRO_BATCH, MICRO_BATCHES = 4, 16
"""A small batch of texts is sorted into `MICRO_BATCHES` micro-batches of at least `LEAST_MICRO_BATCH` texts: with fewer
micro-batches there is more padding, with smaller ones kernels have too little work."""

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class ImageTextBatch:
    """n image-text pairs of one worker."""

    pixels: Tensor
    """`[n, S, S, 3]` uint8."""
    caption: TokenBatch
    """n long texts."""
    summary: TokenBatch | None
    """n short texts; None trains without the summary loss."""

    def __len__(self) -> int:
        return self.pixels.shape[0]


class Part(NamedTuple):
    """Images and texts whose activations are held at the same time; there may be no images or no texts."""

    pixels: Tensor
    """`[c, S, S, 3]` uint8."""
    micro_batches: Sequence[Tensor]
    """Rows of the batch's texts; those of a micro-batch have similar lengths."""


class Features(NamedTuple):
    """Features of a part."""

    image: Tensor
    """`[c, D]`, unit length."""
    text: Tensor
    """`[t, D]`, unit length, in the order of the micro-batches."""
    logit_scale: Tensor
    """`[1]`, exponentiated."""


class PairEncoder(nn.Module):
    """Both towers of a CLIP as one module, which `DistributedDataParallel` can wrap.

    With `checkpoint_layers`, layers are recomputed in backward instead of keeping their activations.
    """

    def __init__(self, model: CLIPModel, transform: ImageTransform, checkpoint_layers: bool = False) -> None:
        super().__init__()
        self.model = model
        self.transform = transform
        self.checkpoint_layers = checkpoint_layers

    def forward(self, part: Part, tokens: TokenBatch) -> Features:
        """Features of the part's images and of its rows of `tokens`."""
        model, recompute = self.model, self.checkpoint_layers
        image = empty = model.logit_scale.new_empty(0, model.config.projection_dim)
        if len(part.pixels):
            pixel_values = self.transform.normalize(part.pixels.to(model.device, non_blocking=True))
            image = encode_image(model, pixel_values, recompute)
        text = [encode_micro_batch(model, tokens, rows, recompute) for rows in part.micro_batches] or [empty]
        return Features(unit(image), unit(torch.cat(text)), at_least_float32(model.logit_scale[None]).exp())

    def trained(self, part: Part) -> Part:
        """The part without the inputs of fully locked towers, which need no gradients."""
        pixels = part.pixels[:0] if is_locked(self.model, "image") else part.pixels
        return Part(pixels, [] if is_locked(self.model, "text") else part.micro_batches)


def backward(
    encoder: PairEncoder | DistributedDataParallel,
    batch: ImageTextBatch,
    loss: LossConfig,
    chunk_size: int | None = None,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Add the gradients of a batch's loss to the parameters. Captions and summaries share their micro-batches.

    Args:
        encoder: a `PairEncoder`, or one in a `DistributedDataParallel`, which averages the gradients.
        batch: this worker's pairs; the same number on every worker.
        loss: the objective.
        chunk_size: for gradient caching, the number of images whose activations are held at a time, and then about as
            many captions and summaries; None holds all. The gradients are equal up to rounding.
        bf16: run the towers in bfloat16. Losses and principal components are always in float32.

    Returns:
        The result of `long_clip_losses`: scalars of this worker, detached.
    """
    tokens = batch.caption if batch.summary is None else concatenate([batch.caption, batch.summary])
    parts = divide(batch.pixels, tokens, chunk_size or len(batch))
    order = inverse_order([rows for part in parts for rows in part.micro_batches])
    device = next(encoder.parameters()).device.type

    def encode(part: Part) -> Features:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return encoder(part, tokens)

    def losses_of(features: Sequence[Tensor]) -> dict[str, Tensor]:
        image, text, logit_scale = features
        texts = text[order.to(text.device)].split(len(batch))  # captions, then summaries
        return long_clip_losses(image, texts[0], texts[1] if len(texts) > 1 else None, logit_scale[0], loss)

    if len(parts) > 1:
        pair_encoder: PairEncoder = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
        losses = cached_backward(encode, parts, [pair_encoder.trained(part) for part in parts], losses_of, encoder)
    else:
        losses = losses_of(encode(parts[0]))
        losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}


def divide(pixels: Tensor, tokens: TokenBatch, chunk_size: int) -> list[Part]:
    """Divide a batch into parts.

    A batch no larger than a chunk is one part. Otherwise there are parts of `chunk_size` images, and as many parts of
    texts, so only one tower's activations are held at a time. Every part of texts has long and short ones.
    """
    images = pixels.split(chunk_size)
    size = min(max(LEAST_MICRO_BATCH, len(tokens) // MICRO_BATCHES), TEXT_MICRO_BATCH, chunk_size)
    micro_batches = text_micro_batches(tokens, size)
    if len(images) == 1:
        return [Part(pixels, micro_batches)]
    texts = [micro_batches[number :: len(images)] for number in range(len(images))]
    return [*(Part(chunk, []) for chunk in images), *(Part(pixels[:0], some) for some in texts)]


@torch.no_grad()
def clamp_logit_scale(model: CLIPModel) -> None:
    """Clamp the temperature as CLIP's authors do: similarities are scaled by at most 100."""
    model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for an optimizer: weight decay for matrices, none for gains, biases, embeddings, temperature.

    Weight decay would move the first position rows, which are frozen.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Fraction of the peak learning rate at `step` (from 0): linear warm-up, then cosine decay to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
