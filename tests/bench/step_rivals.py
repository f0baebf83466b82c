"""Two ways to compute a training step, on the same weights and batch: this library's and the official recipe's.

Needs torch, transformers, numpy, pillow and safetensors only.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad
from transformers import CLIPConfig, CLIPModel

from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch
from longclip.training.loss import LossConfig
from longclip.training.step import ImageTextBatch, PairEncoder, backward

LENGTH = 248
"""Tokens that a Long-CLIP reads."""


class Shape(NamedTuple):
    """Sizes of a CLIP."""

    patch: int
    width: int
    """Of the image tower; its heads are 64 wide."""
    layers: int
    """Of the image tower."""
    text_width: int
    text_heads: int
    text_layers: int = 12
    image_size: int = 224


SHAPES = {
    "B/32": Shape(32, 768, 12, 512, 8),
    "B/16": Shape(16, 768, 12, 512, 8),
    "L/14": Shape(14, 1024, 24, 768, 12),
    "tiny": Shape(16, 64, 2, 64, 2, text_layers=2, image_size=64),
}


def build(name: str, layers: int | None = None) -> CLIPModel:
    """A random CLIP of 248 positions; `layers` cuts both towers short."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "hidden_size": shape.text_width,
            "intermediate_size": 4 * shape.text_width,
            "num_hidden_layers": layers or shape.text_layers,
            "num_attention_heads": shape.text_heads,
            "max_position_embeddings": LENGTH,
            "vocab_size": 49408,
            "eos_token_id": 49407,
            "bos_token_id": 49406,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": shape.width,
            "intermediate_size": 4 * shape.width,
            "num_hidden_layers": layers or shape.layers,
            "num_attention_heads": shape.width // 64,
            "patch_size": shape.patch,
            "image_size": shape.image_size,
        },
        projection_dim=shape.text_width,
    )
    return CLIPModel(config)


def texts(draw: torch.Generator, lengths: Tensor) -> TokenBatch:
    """Random tokens that end with the end token."""
    ids = torch.randint(1, 49406, (len(lengths), int(lengths.max())), generator=draw)
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 0
    ids[torch.arange(len(lengths)), lengths - 1] = 49407
    return TokenBatch(ids, lengths, lengths)


def batch_of(rows: int, image_size: int = 224) -> ImageTextBatch:
    """Random pairs: captions of 180 +- 38 tokens and summaries of about 21, as in ShareGPT4V."""
    draw = torch.Generator().manual_seed(0)
    captions = (torch.randn(rows, generator=draw) * 38 + 180).round().long().clamp(40, LENGTH)
    summaries = (torch.randn(rows, 6, generator=draw).square().sum(1) * 3.2 + 2).round().long().clamp(4, LENGTH)
    # One colour per image plus noise: the features of an untrained tower would otherwise be nearly equal.
    colours = torch.randint(0, 256, (rows, 1, 1, 3), generator=draw)
    noise = torch.randint(-60, 61, (rows, image_size, image_size, 3), generator=draw)
    pixels = (colours + noise).clamp(0, 255).to(torch.uint8)
    return ImageTextBatch(pixels, texts(draw, captions), texts(draw, summaries))


def official_losses(image: Tensor, caption: Tensor, summary: Tensor, scale: Tensor, loss: LossConfig) -> Tensor:
    """The objective as the official code computes it on one process."""
    mean = image.mean(0)
    _, _, vectors = torch.linalg.svd(image - mean, full_matrices=False)
    leading = vectors[: loss.pca_dim].T
    primary = (image - mean) @ leading @ leading.T + mean
    targets = torch.arange(len(image), device=image.device)
    total = image.new_zeros(())
    for weight, left, right in ((1.0, image, caption), (loss.summary_loss_weight, primary, summary)):
        for rows, columns in ((left, right), (right, left)):
            logits = scale * rows @ columns.T
            total = total + weight / 2 * cross_entropy(logits, targets, label_smoothing=loss.label_smoothing)
    return total


class Rival(NamedTuple):
    """A way to compute the step."""

    model: CLIPModel
    step: Callable[[], Tensor]
    """Returns the loss and leaves the gradients in the model."""


class OfficialStep:
    """Both texts padded to 248, whole last layers, principal components by a differentiated SVD."""

    def __init__(self, model: CLIPModel, batch: ImageTextBatch, loss: LossConfig, bf16: bool = False) -> None:
        assert batch.summary is not None
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.device = model.device.type
        self.transform = ImageTransform(model.config.vision_config.image_size)
        self.caption, self.summary = (
            pad(tokens.input_ids, (0, LENGTH - tokens.input_ids.shape[1])).to(self.device)
            for tokens in (batch.caption, batch.summary)
        )
        self.pixels = batch.pixels.to(self.device)

    def __call__(self) -> Tensor:
        """The loss; gradients are left in the model."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            pixel_values = self.transform.normalize(self.pixels)
            image = self.model.get_image_features(pixel_values=pixel_values).pooler_output
            caption, summary = (
                self.model.get_text_features(input_ids=ids).pooler_output for ids in (self.caption, self.summary)
            )
        image, caption, summary = (normalize(tensor.float(), dim=1) for tensor in (image, caption, summary))
        loss = official_losses(image, caption, summary, self.model.logit_scale.exp(), self.loss)
        loss.backward()
        return loss.detach()


class LongClipStep:
    """The step of this library."""

    def __init__(self, model: CLIPModel, batch: ImageTextBatch, loss: LossConfig, bf16: bool = False) -> None:
        self.encoder = PairEncoder(model, ImageTransform(model.config.vision_config.image_size))
        self.batch, self.loss, self.bf16 = batch, loss, bf16

    def __call__(self, chunk_size: int | None = None) -> Tensor:
        """The loss; gradients are left in the model. With `chunk_size`, by gradient caching."""
        return backward(self.encoder, self.batch, self.loss, chunk_size, self.bf16)["loss"]


def rivals(model: CLIPModel, batch: ImageTextBatch, chunk_size: int | None = None) -> dict[str, Rival]:
    """`official`, `ours` and, with `chunk_size`, `cached`, on copies of one model."""
    loss = LossConfig(summary_loss_weight=1.0, pca_dim=min(32, len(batch) // 3))
    copy = deepcopy(model)
    ours = LongClipStep(copy.train(), batch, loss)
    steps = {"official": Rival(model, OfficialStep(model.train(), batch, loss)), "ours": Rival(copy, ours)}
    if chunk_size:
        steps["cached"] = Rival(copy, lambda: ours(chunk_size))
    return steps


def fresh(step: Callable[[], Tensor], model: nn.Module) -> Tensor:
    """A step that begins without gradients and is over when this returns."""
    model.zero_grad(set_to_none=True)
    loss = step()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss
