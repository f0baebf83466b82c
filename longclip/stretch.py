"""Stretching the text position table (Long-CLIP, arXiv 2403.15378, section 3.2).

A CLIP trained on 77 tokens has really learned about the first 20 positions. The knowledge-preserving stretch keeps
those rows as they are and interpolates the others, so 77 positions become 20 + (77 - 20) * 4 = 248.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPModel

KEPT_POSITIONS = 20
STRETCH_FACTOR = 4


def stretch_positions(
    weight: Tensor, kept_positions: int = KEPT_POSITIONS, stretch_factor: int = STRETCH_FACTOR
) -> Tensor:
    """Stretch a position table, keeping its first rows (arXiv 2403.15378, equation 3).

    Row `kept_positions + s * i + r` of the result lies `r / s` of the way from old row `kept_positions + i` to the
    next one. Behind the last old row there is no next one: there the last difference is continued, as in the
    official code.

    Args:
        weight: `[L, D]` position table, `L >= 2`.
        kept_positions: rows copied unchanged, `0 <= kept_positions <= L`.
        stretch_factor: rows made out of each other row, at least 1.

    Returns:
        `[kept_positions + (L - kept_positions) * stretch_factor, D]`, of the dtype and device of `weight`.

    Raises:
        ValueError: the table or one of the two numbers is out of range.
    """
    length = weight.shape[0]
    if weight.ndim != 2 or length < 2:
        raise ValueError(f"weight must be a [L >= 2, D] position table, got shape {tuple(weight.shape)}")
    if not 0 <= kept_positions <= length:
        raise ValueError(f"kept_positions must lie in 0..{length} (the table's length), got {kept_positions}")
    if stretch_factor < 1:
        raise ValueError(f"stretch_factor must be at least 1, got {stretch_factor}")
    steps = torch.arange((length - kept_positions) * stretch_factor, device=weight.device)
    position = kept_positions + steps.double() / stretch_factor
    left = position.floor().long().clamp(max=length - 2)
    fraction = (position - left).unsqueeze(1)
    table = weight.double()
    stretched = table[left] + fraction * (table[left + 1] - table[left])
    return torch.cat([table[:kept_positions], stretched]).to(weight.dtype)


def interpolate_positions(weight: Tensor, context_length: int) -> Tensor:
    """Interpolate a position table uniformly: the baseline that the paper compares with (its Table 4, without KPS).

    Args:
        weight: `[L, D]` position table.
        context_length: rows of the result; the first and the last old row stay first and last.

    Returns:
        `[context_length, D]`, of the dtype and device of `weight`.
    """
    columns = weight.double().T.unsqueeze(0)
    resized = nn.functional.interpolate(columns, size=context_length, mode="linear", align_corners=True)
    return resized[0].T.contiguous().to(weight.dtype)


def replace_positions(model: CLIPModel, weight: Tensor) -> None:
    """Give `model` the text position table `weight` `[L, D]`, in place; its config follows."""
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
    """Keep the first position rows as they are during training.

    The paper trains the stretched rows only. One table of which some rows get no gradient is the same as the official
    code's two tables, and stays a plain `CLIPModel`. The table must not be weight-decayed: decay would move the kept
    rows. Gradients are stopped where rows are read and not at the parameter, which sharding replaces by another one.
    """

    def stop_gradient(module: nn.Module, inputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        (position_ids,) = inputs
        return torch.where((position_ids < kept_positions).unsqueeze(-1), rows.detach(), rows)

    model.text_model.embeddings.position_embedding.register_forward_hook(stop_gradient)
