"""One training step: `longclip.training.step.backward` against the official recipe's arithmetic.

Rivals have the same weights, batch and objective:

    official    both texts padded to 248, whole last layers, principal components by a differentiated SVD
    ours        length-sorted micro-batches, last layers where they are read, projector gradient
    cached      ours with gradient caching, a quarter of the batch at once (with --cached)

With --compile, the layers of ours and cached are compiled.

Captions have 180 +- 38 tokens, summaries about 21, as ShareGPT4V's. First the losses must agree to 1e-6 and the
gradients (of all parameters together) to 1e-5, in float32, else exit code 1.

    python tests/bench/bench_train_step.py [--quick] [--model B/16] [--batch 32]
    python tests/bench/bench_train_step.py --device cuda --model L/14 --batch 1024 --cached --compile

Needs torch, transformers, numpy, pillow and safetensors only. On a CPU: one thread, process CPU time. On a GPU:
bfloat16, wall clock, and the share of the peak that --peak-tflops names. The last line is JSON; `ratio` is official's
time over ours, `flops_ratio` the same of counted operations, `token_efficiency` real over computed tokens.
"""

import gc
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from harness import alternating, arguments, report
from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch, concatenate
from longclip.training.compiling import compile_layers
from longclip.training.loss import LossConfig
from longclip.training.step import ImageTextBatch, PairEncoder, backward, divide

LENGTH = 248
SIZES = {"B/32": (32, 768, 12, 512, 8), "B/16": (16, 768, 12, 512, 8), "L/14": (14, 1024, 24, 768, 12)}
"""Patch size; width and layers of the image tower; width and heads of the text tower, which has 12 layers."""


def build(name: str, layers: int | None) -> CLIPModel:
    """A random CLIP of 248 positions; `layers` cuts both towers short."""
    patch, width, depth, text_width, heads = SIZES[name]
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": layers or 12,
            "num_attention_heads": heads,
            "max_position_embeddings": LENGTH,
            "vocab_size": 49408,
            "eos_token_id": 49407,
            "bos_token_id": 49406,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers or depth,
            "num_attention_heads": width // 64,
            "patch_size": patch,
        },
        projection_dim=text_width,
    )
    return CLIPModel(config)


def texts(draw: torch.Generator, lengths: Tensor) -> TokenBatch:
    """Random tokens that end with the end token."""
    ids = torch.randint(1, 49406, (len(lengths), int(lengths.max())), generator=draw)
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 0
    ids[torch.arange(len(lengths)), lengths - 1] = 49407
    return TokenBatch(ids, lengths, lengths)


def batch_of(rows: int) -> ImageTextBatch:
    """Random pairs."""
    draw = torch.Generator().manual_seed(0)
    captions = (torch.randn(rows, generator=draw) * 38 + 180).round().long().clamp(40, LENGTH)
    summaries = (torch.randn(rows, 6, generator=draw).square().sum(1) * 3.2 + 2).round().long().clamp(4, LENGTH)
    # Pictures of one colour each with some noise: the features of an untrained tower would else be nearly equal.
    colours = torch.randint(0, 256, (rows, 1, 1, 3), generator=draw)
    noise = torch.randint(-60, 61, (rows, 224, 224, 3), generator=draw)
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


class Contenders:
    """The rivals on one device."""

    def __init__(self, model: CLIPModel, batch: ImageTextBatch, device: str, chunk_size: int) -> None:
        self.model, self.batch, self.bf16, self.device = model.to(device).train(), batch, device == "cuda", device
        self.transform = ImageTransform(224)
        self.own = deepcopy(self.model)
        self.encoder = PairEncoder(self.own, self.transform)
        self.loss = LossConfig(summary_loss_weight=1.0, pca_dim=min(32, len(batch) // 3))
        self.chunk_size = chunk_size
        assert batch.summary is not None
        self.padded = [
            pad(tokens.input_ids, (0, LENGTH - tokens.input_ids.shape[1])).to(device)
            for tokens in (batch.caption, batch.summary)
        ]
        self.pixels = batch.pixels.to(device)

    def official(self) -> Tensor:
        """Padded texts, whole layers, SVD."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            pixel_values = self.transform.normalize(self.pixels)
            image = self.model.get_image_features(pixel_values=pixel_values).pooler_output
            caption, summary = (self.model.get_text_features(input_ids=ids).pooler_output for ids in self.padded)
        image, caption, summary = (normalize(tensor.float(), dim=1) for tensor in (image, caption, summary))
        loss = official_losses(image, caption, summary, self.model.logit_scale.exp(), self.loss)
        loss.backward()
        return loss.detach()

    def ours(self, chunk_size: int | None = None) -> Tensor:
        """The step of this library."""
        return backward(self.encoder, self.batch, self.loss, chunk_size, self.bf16)["loss"]

    def rivals(self, cached: bool) -> dict[str, "Rival"]:
        """By name."""
        found = {"official": Rival(self.model, self.official), "ours": Rival(self.own, self.ours)}
        return found | ({"cached": Rival(self.own, partial(self.ours, self.chunk_size))} if cached else {})


class Rival(NamedTuple):
    """A way to compute the step."""

    model: CLIPModel
    step: Callable[[], Tensor]
    """The loss; gradients are left in the model."""


def fresh(step: Callable[[], Tensor], model: nn.Module, device: str) -> Tensor:
    """A step that begins without gradients and is over when this returns."""
    model.zero_grad(set_to_none=True)
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return loss


def compare(contenders: Contenders, rivals: dict[str, Rival]) -> None:
    """End the benchmark if the rivals do not compute the same (in float32)."""
    bf16, contenders.bf16 = contenders.bf16, False
    found = {}
    for name, (model, step) in rivals.items():
        loss = fresh(step, model, contenders.device)
        found[name] = loss, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    contenders.bf16 = bf16
    exact_loss, exact = found["official"]
    norm = sum(gradient.square().sum() for gradient in exact.values()).sqrt()
    for name, (loss, gradients) in found.items():
        in_loss = float((loss - exact_loss).abs() / exact_loss)
        in_gradient = float(sum((gradients[key] - exact[key]).square().sum() for key in exact).sqrt() / norm)
        print(f"{name}: loss differs by {in_loss:.1e}, gradient by {in_gradient:.1e}", flush=True)
        if in_loss > 1e-6 or in_gradient > 1e-5:
            sys.exit(f"error: {name} computes something else")


def main() -> None:
    """Compare, measure, report."""
    options = arguments(
        __doc__,
        model={"choices": list(SIZES), "default": "B/32"},
        batch={"type": int, "default": None, "help": "pairs (default: 32; 6 with --quick)"},
        device={"choices": ["cpu", "cuda"], "default": "cpu"},
        cached={"action": "store_true", "help": "with gradient caching as well"},
        compile={"action": "store_true", "help": "compile the layers of ours"},
        peak_tflops={"type": float, "default": 989.0, "help": "dense bfloat16 peak of the GPU (default: H100, H200)"},
    )
    torch.set_num_threads(1)
    batch = batch_of(options.batch or (6 if options.quick else 32))
    contenders = Contenders(
        build(options.model, 3 if options.quick else None), batch, options.device, max(1, len(batch) // 4)
    )
    rivals = contenders.rivals(options.cached)
    flops = {}
    for name, (model, step) in rivals.items():
        with FlopCounterMode(display=False) as counter:
            fresh(step, model, options.device)
        flops[name] = counter.get_total_flops()
    if options.compile:  # the counter sees no operations in compiled layers
        compile_layers(contenders.own)
    compare(contenders, rivals)
    gc.collect()
    runs = {name: partial(fresh, step, model, options.device) for name, (model, step) in rivals.items()}
    if options.compile and options.device == "cuda":  # bfloat16 has graphs of its own
        runs["ours"]()
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds = alternating(runs, 3 if options.quick else 5, clock)
    assert batch.summary is not None
    both = concatenate([batch.caption, batch.summary])
    (part,) = divide(batch.pixels, both, len(batch))
    computed = sum(len(rows) * int(both.lengths[rows].max()) for rows in part.micro_batches)
    figures = {}
    if options.device == "cuda":
        useful = flops["ours"]
        figures["share_of_peak"] = {
            name: round(useful / s / options.peak_tflops / 1e12, 3) for name, s in seconds.items()
        }
    report(
        "train_step",
        options.quick,
        model=options.model,
        batch=len(batch),
        compiled=options.compile,
        device=torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread",
        ratio=round(seconds["official"] / seconds["ours"], 2),
        flops_ratio=round(flops["official"] / flops["ours"], 2),
        token_efficiency=round(int(both.lengths.sum()) / computed, 3),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        pairs_per_second={name: round(len(batch) / value, 2) for name, value in seconds.items()},
        **figures,
    )


if __name__ == "__main__":
    main()
