"""Gradient caching (GradCache, arXiv 2101.06983): large batches in bounded memory, with one loss over all of them.

Features of all parts are computed without their activations; the loss of the whole batch gives the gradients of the
features; then each part is computed again, with its activations, and takes its share of them to the parameters. Memory
grows with a part and not with the batch, for one more forward pass. The gradients are those of the plain step up to
rounding. Splitting the *loss* instead would not do: principal components are those of the whole batch.
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
        encode: tensors of a part, `[rows, ...]` each; the same tensors when called twice, so no dropout.
        parts: what is encoded at once.
        trained: what of each part leads to parameters that are trained, and is computed again. A tensor that needs no
            gradient may then be shorter or empty.
        losses_of: named losses of these tensors, each concatenated over the parts in their order.
        module: what `encode` calls. If it is a `DistributedDataParallel`, its workers average gradients once, behind
            the last part.

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
            again = encode(part)
            ends = [start + len(tensor) for start, tensor in zip(starts, again, strict=True)]
            shares = [gradient[a:b] for gradient, a, b in zip(gradients, starts, ends, strict=True)]
            wanted = [number for number, tensor in enumerate(again) if tensor.requires_grad]
            torch.autograd.backward([again[number] for number in wanted], [shares[number] for number in wanted])
            starts = ends
    if parallel:
        average_gradients(module)
    return losses
