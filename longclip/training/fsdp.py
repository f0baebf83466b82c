"""Sharding the towers among the workers (FSDP2), for models whose weights, gradients and optimizer state do not fit on
one device.

Each worker holds a shard of every parameter. Layers are gathered when they are needed and freed after use. Embeddings,
projections and the last layer of each tower, which is computed for one row without its `forward` (`longclip.encode`),
form one group that stays gathered during a step. Gradients are averaged as in `DistributedDataParallel`, so the step is
the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from longclip.training.distributed import sum_over_workers, world_size
from longclip.training.step import PairEncoder


def shard(encoder: PairEncoder) -> None:
    """Shard the parameters among the workers, in place. The encoder remains a `PairEncoder`.

    Call this on the training device, with the same weights on every worker, after `compile_layers` and before creating
    the optimizer. `torch.distributed.checkpoint.state_dict` gathers weights and optimizer state.

    Raises:
        ValueError: there is no process group.
    """
    if not torch.distributed.is_initialized():
        raise ValueError("sharding needs a process group; call torch.distributed.init_process_group first")
    model = encoder.model
    mesh = init_device_mesh(model.device.type, (world_size(),))
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers[:-1]:
            fully_shard(layer, mesh=mesh)
    # A scalar cannot be sharded.
    fully_shard(encoder, mesh=mesh, ignored_params={model.logit_scale})
    model.logit_scale.register_hook(lambda gradient: sum_over_workers(gradient) / world_size())


@contextmanager
def whole_outside_layers(encoder: nn.Module) -> Iterator[None]:
    """Context in which the towers of a sharded encoder can be called directly, e.g. by `encode_text`; no gradients.

    The encoder must have run once before. Does nothing to an encoder that is not sharded.
    """
    if not isinstance(encoder, FSDPModule):
        yield
        return
    encoder.unshard()
    try:
        yield
    finally:
        encoder.reshard()


def clip_gradients(encoder: nn.Module, max_norm: float) -> Tensor:
    """Clip the norm of gradients, sharded or not, to `max_norm`. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(encoder.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
