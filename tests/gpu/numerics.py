"""The training step on a device, in every mode, against float64 on the CPU, for a tiny CLIP."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from longclip.encode import encode_image, encode_text
from longclip.images import ImageTransform
from longclip.training.compiling import compile_layers
from longclip.training.loss import LossConfig
from longclip.training.pcm import primary_components
from longclip.training.step import PairEncoder, backward
from step_rivals import batch_of, build

PAIRS = 48
LOSS = LossConfig(summary_loss_weight=1.0, pca_dim=8)
BATCH = batch_of(PAIRS, image_size=64)
TRANSFORM = ImageTransform(64)


def numerics(device: str) -> list[dict[str, Any]]:
    """Checks with `name`, relative `error` (of norms), `limit` and `passed`."""
    # Float32 is to be float32: cuDNN's convolutions are in TF32 unless told otherwise.
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        checks = [*_features(device), *_steps(device), *_components(device)]
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return [{"name": name, "error": error, "limit": limit, "passed": error <= limit} for name, error, limit in checks]


def _model(device: str, dtype: torch.dtype) -> CLIPModel:
    return build("tiny").to(device, dtype).train()


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().cpu().double() - exact).norm() / exact.norm())


@torch.no_grad()
def _features(device: str) -> Iterator[tuple[str, float, float]]:
    exact, model = _model("cpu", torch.float64), _model(device, torch.float32)
    pixels = TRANSFORM.normalize(BATCH.pixels)
    cases = {
        "image features": (encode_image(exact, pixels.double()), lambda: encode_image(model, pixels)),
        "text features": (encode_text(exact, BATCH.caption), lambda: encode_text(model, BATCH.caption)),
    }
    for name, (reference, compute) in cases.items():
        yield f"{name}, float32", _error(compute(), reference), 1e-5
        with torch.autocast(device, torch.bfloat16):
            yield f"{name}, bf16", _error(compute().float(), reference), 3e-2


def _step(
    model: CLIPModel, bf16: bool = False, chunk_size: int | None = None, again: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss and gradient `[P]` of a step."""
    losses = backward(PairEncoder(model, TRANSFORM, again), BATCH, LOSS, chunk_size, bf16)
    return losses["loss"], _gradient(model)


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _steps(device: str) -> Iterator[tuple[str, float, float]]:
    exact_loss, exact = _step(_model("cpu", torch.float64))
    model = _model(device, torch.float32)
    compiled = deepcopy(model)
    # Inductor needs a compiler on a CPU; there, the graphs alone are checked.
    compile_layers(compiled, "inductor" if device == "cuda" else "aot_eager")
    modes: dict[str, tuple[CLIPModel, dict[str, Any], float, float]] = {
        "float64": (_model(device, torch.float64), {}, 1e-10, 1e-8),
        "float32": (deepcopy(model), {}, 1e-5, 1e-5),
        "float32, cached": (deepcopy(model), {"chunk_size": 16}, 1e-5, 1e-5),
        "float32, checkpointed": (deepcopy(model), {"again": True}, 1e-5, 1e-5),
        "float32, compiled": (compiled, {}, 1e-5, 1e-5),
        "bf16": (deepcopy(model), {"bf16": True}, 5e-3, 5e-2),
        "bf16, compiled": (compiled, {"bf16": True}, 5e-3, 5e-2),
    }
    for name, (variant, options, loss_limit, gradient_limit) in modes.items():
        variant.zero_grad(set_to_none=True)
        loss, gradient = _step(variant, **options)
        yield f"loss, {name}", _error(loss, exact_loss), loss_limit
        yield f"gradient, {name}", _error(gradient, exact), gradient_limit


def _components(device: str) -> Iterator[tuple[str, float, float]]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 128, generator=draw, dtype=torch.float64) * torch.linspace(2, 0.1, 128) + 1
    rows = rows / rows.norm(dim=1, keepdim=True)
    weights = torch.randn(512, 128, generator=draw, dtype=torch.float64)

    def both(features: Tensor) -> tuple[Tensor, Tensor]:
        leaf = features.clone().requires_grad_()
        primary = primary_components(leaf, 32)
        primary.backward(weights.to(primary))
        assert leaf.grad is not None
        return primary, leaf.grad

    exact, exact_gradient = both(rows)
    primary, gradient = both(rows.to(device, torch.float32))
    yield "primary components, float32", _error(primary, exact.detach()), 1e-5
    yield "gradient of primary components, float32", _error(gradient, exact_gradient), 1e-4
