"""Freezing a tower of a CLIP, completely (LiT, arXiv 2111.07991) or except for its last groups of modules.

Groups are counted from the output, like open_clip does: the projection into the shared space, the last layer with the
norm after it, every layer before it, and the embeddings (with the norm after them in the image tower). Locked modules
have no gradients and no optimizer state, and no autograd graph unless something before them is trained.
"""

from torch import nn
from transformers import CLIPModel

from longclip.constants import TowerName


def tower_groups(model: CLIPModel, tower: TowerName) -> list[list[nn.Module]]:
    """Modules of a tower from input to output, in layers + 2 groups that are locked together."""
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
    """Freeze a tower during training, except for its last `unlocked_groups` groups. In place.

    Args:
        model: the CLIP. Its temperature belongs to neither tower and is still trained.
        tower: `image` or `text`. A fully locked text tower leaves stretched positions untrained.
        unlocked_groups: groups to train, counted from the output (1: the projection); less than the number of groups.

    Raises:
        ValueError: `unlocked_groups` leaves nothing to lock, or is negative.
    """
    groups = tower_groups(model, tower)
    if not 0 <= unlocked_groups < len(groups):
        raise ValueError(
            f"unlocked_groups must be in 0..{len(groups) - 1} ({len(groups)} groups of the {tower} tower: embeddings,"
            f" {len(groups) - 2} layers, projection), got {unlocked_groups}"
        )
    for group in groups[: len(groups) - unlocked_groups]:
        for module in group:
            module.requires_grad_(False)


def is_locked(model: CLIPModel, tower: TowerName) -> bool:
    """Whether no parameter of a tower is trained."""
    modules = [module for group in tower_groups(model, tower) for module in group]
    return not any(parameter.requires_grad for module in modules for parameter in module.parameters())
