"""What tests of training share: a tiny CLIP whose gradients do not vanish, and one batch that workers divide."""

from collections.abc import Callable

import torch
from torch import Tensor

from longclip.checkpoint import new_model
from longclip.stretch import freeze_kept_positions
from longclip.tokenizer import TokenBatch
from longclip.training.loss import LossConfig
from longclip.training.step import ImageTextBatch, PairEncoder
from tests.support.tiny_clip import tiny_config

PAIRS = 12
LOSS = LossConfig(summary_loss_weight=0.7, pca_dim=4)


def tiny_encoder(dtype: torch.dtype = torch.float64, checkpoint_layers: bool = False) -> PairEncoder:
    torch.manual_seed(0)
    checkpoint = new_model(tiny_config(64))
    model = checkpoint.model.to(dtype)
    freeze_kept_positions(model)
    # Larger vision weights: features of an untrained tower are so alike that gradients would vanish.
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.mul_(3)
    return PairEncoder(model, checkpoint.transform, checkpoint_layers)


def _tokens(draw: torch.Generator, longest: int) -> TokenBatch:
    lengths = torch.randint(3, longest + 1, (PAIRS,), generator=draw)
    ids = torch.randint(1, 49406, (PAIRS, longest), generator=draw)
    column = torch.arange(longest)
    ids[column >= lengths[:, None]] = 0
    ids[torch.arange(PAIRS), lengths - 1] = 49407
    return TokenBatch(ids, lengths, lengths)


def share_of_batch(world_size: int, rank: int, seed: int = 1) -> ImageTextBatch:
    """A worker's part of the batch of a seed."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (PAIRS, 32, 32, 3), dtype=torch.uint8, generator=draw)
    rows = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    caption, summary = (
        TokenBatch(tokens.input_ids[rows], tokens.lengths[rows], tokens.full_lengths[rows])
        for tokens in (_tokens(draw, 60), _tokens(draw, 12))
    )
    return ImageTextBatch(pixels[rows], caption, summary)


def gradients(encoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in actual.items():
        # The floor is for gradients that are zero but for rounding, e.g. of biases of keys.
        assert (gradient - expected[name]).norm() <= tolerance * (expected[name].norm() + 1e-4 * largest), name


def most_bytes_held(step: Callable[[], object]) -> int:
    """Most bytes that autograd held at once during a step."""
    now, most = 0, 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor, self.bytes = tensor, tensor.nbytes
            now += self.bytes
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        step()
    return most
