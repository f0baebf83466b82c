"""Training a part of a CLIP: towers that stay as they are, wholly (LiT, arXiv 2111.07991) or but for their last groups.

Groups are counted as open_clip does, from the output: the projection into the shared space, the last layer with the
norm behind it, every layer before, and the embeddings (with the norm behind them in the image tower). What is locked
has no gradient, no optimizer state, and no autograd graph as far as nothing before it is trained.
"""

from typing import Literal

from torch import nn
from transformers import CLIPModel

TowerName = Literal["image", "text"]


def tower_groups(model: CLIPModel, tower: TowerName) -> list[list[nn.Module]]:
    """Modules of a tower from input to output, in groups that are locked together: layers + 2."""
    if tower == "image":
        vision = model.vision_model
        first, layers, norm = [vision.embeddings, vision.pre_layrnorm], vision.encoder.layers, vision.post_layernorm
        projection = model.visual_projection
    else:
        text = model.text_model
        first, layers, norm = [text.embeddings], text.encoder.layers, text.final_layer_norm
        projection = model.text_projection
    *others, last = layers
    return [first, *([layer] for layer in others), [last, norm], [projection]]


def lock_tower(model: CLIPModel, tower: TowerName, unlocked_groups: int = 0) -> None:
    """Keep a tower as it is during training, but for its last `unlocked_groups` groups. In place.

    Args:
        model: the CLIP. Its temperature belongs to neither tower and stays trained.
        tower: `image` or `text`. A wholly locked text tower keeps stretched positions untrained.
        unlocked_groups: groups that train, counted from the output (1: the projection), below the number of groups.

    Raises:
        ValueError: `unlocked_groups` leaves nothing to lock, or is negative.
    """
    groups = tower_groups(model, tower)
    if not 0 <= unlocked_groups < len(groups):
        raise ValueError(
            f"unlocked_groups must lie in 0..{len(groups) - 1} ({len(groups)} groups of the {tower} tower: embeddings,"
            f" {len(groups) - 2} layers, projection), got {unlocked_groups}"
        )
    for group in groups[: len(groups) - unlocked_groups]:
        for module in group:
            module.requires_grad_(False)


def is_locked(model: CLIPModel, tower: TowerName) -> bool:
    """Whether nothing of a tower is trained."""
    modules = [module for group in tower_groups(model, tower) for module in group]
    return not any(parameter.requires_grad for module in modules for parameter in module.parameters())
