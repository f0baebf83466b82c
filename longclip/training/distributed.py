"""Collectives of the training step. Without a process group each one is the identity."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all workers, outside autograd."""
    if not is_distributed():
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of a module's parameters by their means over all workers."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if is_distributed():
        for pending in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            pending.wait()
        torch._foreach_div_(gradients, world_size())


def gather_with_gradient(features: Tensor) -> Tensor:
    """Concatenate `features [n, D]` of all workers in rank order to `[world * n, D]`, differentiably.

    The gradient of a row is summed over every worker's use of it. DDP then averages parameter gradients, so a loss that
    is a mean over local rows gets exactly the gradient of the mean over the global batch. `n` must be equal everywhere.
    """
    return _Gather.apply(features) if is_distributed() else features


class _Gather(Function):
    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.rows = features.shape[0]
        gathered = features.new_empty(world_size() * ctx.rows, *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        local = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(local, gradient.contiguous())
        return local
