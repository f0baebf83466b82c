"""Towers that are shared out among the workers (FSDP2): for models of which one device cannot hold weights, gradients
and optimizer state.

Each worker holds its part of every parameter. Layers are put together when they are needed and taken apart again;
embeddings, projections and the last layer of either tower, which runs at one row without its `forward`
(`longclip.encode`), form one group that is whole from the beginning of a step to its end. Gradients are averaged, as
`DistributedDataParallel` does, so the step is the same.
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
    """Share the parameters out among the workers, in place. It stays a `PairEncoder`.

    Call it on the device of training, with the same weights on every worker, after `compile_layers` and before the
    optimizer is made. `torch.distributed.checkpoint.state_dict` puts weights and optimizer state together again.

    Raises:
        ValueError: there is no process group.
    """
    if not torch.distributed.is_initialized():
        raise ValueError("parameters are shared out among the workers of a process group, but there is none")
    model = encoder.model
    mesh = init_device_mesh(model.device.type, (world_size(),))
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers[:-1]:
            fully_shard(layer, mesh=mesh)
    # A single number cannot be shared out.
    fully_shard(encoder, mesh=mesh, ignored_params={model.logit_scale})
    model.logit_scale.register_hook(lambda gradient: sum_over_workers(gradient) / world_size())


@contextmanager
def whole_outside_layers(encoder: nn.Module) -> Iterator[None]:
    """In it, the towers of a sharded encoder can be used by themselves, e.g. by `encode_text`, without gradients.

    Before, the encoder must have run once. Nothing happens to an encoder that is not sharded.
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
    """Scale gradients, sharded ones too, to a norm of at most `max_norm`. Returns their norm before it."""
    norm = nn.utils.clip_grad_norm_(encoder.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
