"""One training step of Long-CLIP, as a module: a batch goes in, named losses come out.

It needs no Ray. `DistributedDataParallel(LongClipTask(model, config))` trains on several processes with the gradients
that one process would have on the whole batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from longclip.encode import encode_image, encode_text, unit
from longclip.images import ImageTransform
from longclip.loss import LossConfig, long_clip_losses
from longclip.tokenizer import TokenBatch

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class ImageTextBatch:
    """n pairs of one worker."""

    pixels: Tensor
    """`[n, S, S, 3]` uint8."""
    caption: TokenBatch
    summary: TokenBatch | None

    def __len__(self) -> int:
        return self.pixels.shape[0]


class LongClipTask(nn.Module):
    """A CLIP together with its training objective."""

    def __init__(self, model: CLIPModel, transform: ImageTransform, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.transform = transform
        self.loss = loss

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Losses of a batch: `loss`, `caption_loss`, `summary_loss` (with summaries), scalars."""
        device = self.model.device
        pixel_values = self.transform.normalize(batch.pixels.to(device, non_blocking=True))
        image_features = unit(encode_image(self.model, pixel_values))
        caption_features = unit(encode_text(self.model, batch.caption))
        summary_features = unit(encode_text(self.model, batch.summary)) if batch.summary is not None else None
        logit_scale = self.model.logit_scale.float().exp()
        return long_clip_losses(image_features, caption_features, summary_features, logit_scale, self.loss)


@torch.no_grad()
def clamp_logit_scale(model: CLIPModel) -> None:
    """Keep the temperature where CLIP's authors keep it: similarities are scaled by at most 100."""
    model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups: matrices are decayed; gains, biases, embeddings and the temperature are not.

    Embeddings must not be: the first position rows are frozen, and weight decay would move them.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
