"""Stretching the text position table (Long-CLIP, arXiv 2403.15378, section 3.2).

Of its 77 positions, CLIP has trained the first 20 well. The knowledge-preserving stretch keeps those rows unchanged and
interpolates the others: 20 + (77 - 20) * 4 = 248.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from longclip.checkpoint import Checkpoint
from longclip.constants import CLIP_CONTEXT_LENGTH, KEPT_POSITIONS, STRETCH_FACTOR
from longclip.errors import CheckpointError, ConfigError


def stretch_positions(
    weight: Tensor, kept_positions: int = KEPT_POSITIONS, stretch_factor: int = STRETCH_FACTOR
) -> Tensor:
    """Stretch a position table, keeping its first rows (arXiv 2403.15378, equation 3).

    Row `kept_positions + s * i + r` of the result lies `r / s` of the way from old row `kept_positions + i` to the
    next one. After the last old row the last difference is extrapolated, as in the official code.

    Args:
        weight: `[L, D]` position table, `L >= 2`.
        kept_positions: rows copied unchanged, `0 <= kept_positions <= L`.
        stretch_factor: rows made from each of the others, at least 1.

    Returns:
        `[kept_positions + (L - kept_positions) * stretch_factor, D]`, of the dtype and device of `weight`.

    Raises:
        ValueError: the table or one of the two numbers is out of range.
    """
    length = weight.shape[0]
    if weight.ndim != 2 or length < 2:
        raise ValueError(f"weight must be a [L >= 2, D] position table, got shape {tuple(weight.shape)}")
    if not 0 <= kept_positions <= length:
        raise ValueError(f"kept_positions must be in 0..{length} (the table's length), got {kept_positions}")
    if stretch_factor < 1:
        raise ValueError(f"stretch_factor must be at least 1, got {stretch_factor}")
    steps = torch.arange((length - kept_positions) * stretch_factor, device=weight.device)
    position = kept_positions + steps.double() / stretch_factor
    left = position.floor().long().clamp(max=length - 2)
    fraction = (position - left).unsqueeze(1)
    table = weight.double()
    stretched = table[left] + fraction * (table[left + 1] - table[left])
    return torch.cat([table[:kept_positions], stretched]).to(weight.dtype)


def stretch_checkpoint(
    checkpoint: Checkpoint, kept_positions: int = KEPT_POSITIONS, stretch_factor: int = STRETCH_FACTOR
) -> Checkpoint:
    """Stretch the text positions of a CLIP (see `stretch_positions`): 77 become 248.

    Args:
        checkpoint: a CLIP of at most 77 positions; its model is changed in place.
        kept_positions: first position rows to keep unchanged.
        stretch_factor: rows made from each of the others.

    Returns:
        The same model with a tokenizer of its new context length.

    Raises:
        CheckpointError: the model is stretched already.
        ConfigError: one of the numbers is out of range.
    """
    if checkpoint.context_length > CLIP_CONTEXT_LENGTH:
        raise CheckpointError(
            f"the model already has {checkpoint.context_length} text positions, and stretching starts from at most"
            f" {CLIP_CONTEXT_LENGTH}; use it as it is, without stretching"
        )
    try:
        table = stretch_positions(text_positions(checkpoint.model).detach(), kept_positions, stretch_factor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    replace_positions(checkpoint.model, table)
    tokenizer = copy.copy(checkpoint.tokenizer)  # a deep copy would lose its decoder
    tokenizer.model_max_length = table.shape[0]
    return Checkpoint(checkpoint.model, tokenizer, checkpoint.transform)


def interpolate_positions(weight: Tensor, context_length: int) -> Tensor:
    """Interpolate a position table uniformly: the baseline of the paper (its Table 4, without KPS).

    Args:
        weight: `[L, D]` position table.
        context_length: rows of the result; its first and last rows are those of `weight`.

    Returns:
        `[context_length, D]`, of the dtype and device of `weight`.
    """
    columns = weight.double().T.unsqueeze(0)
    resized = nn.functional.interpolate(columns, size=context_length, mode="linear", align_corners=True)
    return resized[0].T.contiguous().to(weight.dtype)


def replace_positions(model: CLIPModel, weight: Tensor) -> None:
    """Set the text position table of `model` to `weight` `[L, D]`, in place, and update its config."""
    embeddings = model.text_model.embeddings
    table = nn.Embedding.from_pretrained(weight.detach().clone(), freeze=False)
    embeddings.position_embedding = table.to(weight.device)
    embeddings.register_buffer(
        "position_ids", torch.arange(weight.shape[0], device=weight.device).unsqueeze(0), persistent=False
    )
    model.config.text_config.max_position_embeddings = weight.shape[0]


def text_positions(model: CLIPModel) -> nn.Parameter:
    """The text position table `[L, D]` of a CLIP."""
    return model.text_model.embeddings.position_embedding.weight


def freeze_kept_positions(model: CLIPModel, kept_positions: int = KEPT_POSITIONS) -> None:
    """Freeze the first text position rows during training.

    The paper trains the stretched rows only. One table with rows that get no gradient is equivalent to the official
    code's two tables, and the model stays a plain `CLIPModel`. Do not apply weight decay to the table: it would move
    the frozen rows. Gradients are stopped where rows are read and not at the parameter, which sharding replaces.
    """

    def stop_gradient(module: nn.Module, inputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        (position_ids,) = inputs
        return torch.where((position_ids < kept_positions).unsqueeze(-1), rows.detach(), rows)

    model.text_model.embeddings.position_embedding.register_forward_hook(stop_gradient)
