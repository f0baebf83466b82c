"""Gradient caching (GradCache, arXiv 2101.06983): large batches in bounded memory, with one loss over all of them.

Features of all parts are computed without keeping activations, and the loss of the whole batch gives their gradients.
Then each part is computed a second time, with activations, and backpropagates its share. Memory depends on the size of
a part and not of the batch; the price is one more forward pass. The gradients equal those of the plain step up to
rounding. Splitting the *loss* instead would be wrong: principal components are those of the whole batch.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longclip.training.distributed import average_gradients

Part = TypeVar("Part")
Losses = dict[str, Tensor]


def cached_backward(
    encode: Callable[[Part], Sequence[Tensor]],
    parts: Sequence[Part],
    trained: Sequence[Part],
    losses_of: Callable[[list[Tensor]], Losses],
    module: nn.Module,
) -> Losses:
    """Add the gradients of `losses_of(features of all parts)["loss"]` to the parameters.

    Args:
        encode: returns the tensors of a part, `[rows, ...]` each. Must be deterministic, so no dropout.
        parts: what is encoded at a time.
        trained: what of each part must be recomputed because it depends on trained parameters. A tensor that needs no
            gradient may be shorter or empty.
        losses_of: named losses of these tensors, each concatenated over the parts in their order.
        module: what `encode` calls. If it is a `DistributedDataParallel`, gradients are averaged once, after the last
            part.

    Returns:
        The losses.
    """
    with torch.no_grad():
        features = [encode(part) for part in parts]
    leaves = [torch.cat(columns).requires_grad_() for columns in zip(*features, strict=True)]
    losses = losses_of(leaves)
    losses["loss"].backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    starts = [0] * len(leaves)
    parallel = isinstance(module, DistributedDataParallel)
    with module.no_sync() if parallel else nullcontext():  # type: ignore[operator]
        for part in trained:
            recomputed = encode(part)
            ends = [start + len(tensor) for start, tensor in zip(starts, recomputed, strict=True)]
            shares = [gradient[a:b] for gradient, a, b in zip(gradients, starts, ends, strict=True)]
            wanted = [number for number, tensor in enumerate(recomputed) if tensor.requires_grad]
            torch.autograd.backward([recomputed[number] for number in wanted], [shares[number] for number in wanted])
            starts = ends
    if parallel:
        average_gradients(module)
    return losses
