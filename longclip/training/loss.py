"""The two losses of Long-CLIP (arXiv 2403.15378, section 3.3).

The long caption is matched to the image feature, the short summary to the feature's primary components.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from longclip.constants import Scope
from longclip.training import distributed
from longclip.training.pcm import components

MAX_LOGITS = 2**26
"""Logits held at a time in each direction (256 MiB in float32); those of larger batches are recomputed in backward."""


@dataclass(frozen=True)
class LossConfig:
    """The training objective."""

    summary_loss_weight: float = 0.1
    """Weight of the summary (PCM) loss. The official code has 1.0; later studies found 0.1 to 0.3 better."""
    pca_dim: int = 32
    """Principal components of the image features that the summary is matched to."""
    pca_scope: Scope = "global"
    """Rows that the components are computed from: the global batch, or this worker's as in the official code."""
    label_smoothing: float = 0.1
    """Label smoothing of both losses (official code: 0.1)."""


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, smoothing: float) -> Tensor:
    """Symmetric cross-entropy of local rows against the rows of all workers.

    Args:
        image_features: `[n, D]` this worker's image features, in the order of `text_features`.
        text_features: `[n, D]` this worker's text features.
        logit_scale: scalar that multiplies the similarities (already exponentiated).
        smoothing: label smoothing, 0 to 1.

    Returns:
        Scalar mean over this worker's rows and both directions.
    """
    rows = image_features.shape[0]
    targets = torch.arange(rows, device=image_features.device) + distributed.rank() * rows
    all_images, all_texts = (distributed.gather_with_gradient(features) for features in (image_features, text_features))
    per_image = _cross_entropy(logit_scale * image_features, all_texts, targets, smoothing)
    per_text = _cross_entropy(logit_scale * text_features, all_images, targets, smoothing)
    return (per_image + per_text) / 2


def _cross_entropy(rows: Tensor, columns: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of `rows @ columns.T` `[n, N]`, computed in blocks if it is large."""

    def block(some: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(some @ columns.T, targets, label_smoothing=smoothing, reduction="sum")

    size = max(1, MAX_LOGITS // len(columns))
    if len(rows) <= size:
        return block(rows, columns, targets) / len(rows)
    total = rows.new_zeros(())
    for some, wanted in zip(rows.split(size), targets.split(size), strict=True):
        total = total + checkpoint(block, some, columns, wanted, use_reentrant=False)
    return total / len(rows)


def long_clip_losses(
    image_features: Tensor,
    caption_features: Tensor,
    summary_features: Tensor | None,
    logit_scale: Tensor,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Named losses of one batch; `loss` is their weighted sum.

    Args:
        image_features: `[n, D]`, unit length.
        caption_features: `[n, D]`, unit length.
        summary_features: `[n, D]`, unit length; None omits the summary loss.
        logit_scale: exponentiated temperature, a scalar.
        config: weights and options.

    Returns:
        Scalars: `loss`, `caption_loss` and, with summaries, `summary_loss` and the measurements `retained_variance` and
        `pca_gap` of `pcm.Components`.
    """
    caption_loss = contrastive_loss(image_features, caption_features, logit_scale, config.label_smoothing)
    if summary_features is None:
        return {"loss": caption_loss, "caption_loss": caption_loss}
    primary = components(image_features, config.pca_dim, config.pca_scope)
    summary_loss = contrastive_loss(primary.features, summary_features, logit_scale, config.label_smoothing)
    loss = caption_loss + config.summary_loss_weight * summary_loss
    return {
        "loss": loss,
        "caption_loss": caption_loss,
        "summary_loss": summary_loss,
        "retained_variance": primary.retained_variance,
        "pca_gap": primary.gap,
    }
