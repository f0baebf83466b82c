"""PyTorch files that the code of openai/CLIP and of beichenzbc/Long-CLIP loads: a plain state dict of tensors."""

from pathlib import Path

import torch

from longclip.checkpoint import Checkpoint
from longclip.weights.limits import require, require_clip, require_openai_pixels, require_openai_tower_shapes
from longclip.weights.state_dicts import VISION_HEAD_WIDTH, split_positions, to_openai

OPENAI_POSITIONS = 77
LONG_CLIP_POSITIONS = 248


def write_openai(checkpoint: Checkpoint, file: Path) -> str:
    """Write a state dict in OpenAI's layout; TorchScript, as in OpenAI's downloads, is not needed to load one.

    Returns:
        How to load it.

    Raises:
        CheckpointError: OpenAI's code would build another model of these weights.
    """
    _require_openai_code(checkpoint, OPENAI_POSITIONS, "export a longer one with `--to long-clip` or another format")
    width = checkpoint.model.config.vision_config.hidden_size
    require(
        width not in VISION_HEAD_WIDTH,
        f"an image tower of width {width}",
        f"others: files of open_clip have the same layout and, at this width, heads of {VISION_HEAD_WIDTH.get(width)}",
    )
    torch.save(to_openai(checkpoint.model.state_dict()), file)
    return 'clip.load("{path}")'


def write_long_clip(checkpoint: Checkpoint, file: Path) -> str:
    """Write a state dict of the official Long-CLIP code, with its two position tables.

    Returns:
        How to load it.

    Raises:
        CheckpointError: the official code would build another model of these weights.
    """
    _require_openai_code(checkpoint, LONG_CLIP_POSITIONS, "other lengths fit every other format but `openai`")
    torch.save(split_positions(to_openai(checkpoint.model.state_dict())), file)
    return 'longclip.load("{path}")'


def _require_openai_code(checkpoint: Checkpoint, positions: int, otherwise: str) -> None:
    config = checkpoint.model.config
    length = checkpoint.context_length
    require(length == positions, f"{length} text positions", f"{positions}, which stand in its code; {otherwise}")
    activation = require_clip(config)
    require(activation == "quick_gelu", f"the activation {activation}", "quick_gelu")
    require_openai_tower_shapes(config)
    require_openai_pixels(checkpoint)
