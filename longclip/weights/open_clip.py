"""Directories that open_clip loads with `local-dir:`, and from the hub with `hf-hub:`."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from longclip.checkpoint import Checkpoint
from longclip.weights.limits import require, require_clip
from longclip.weights.side_configs import OPEN_CLIP_CONFIG
from longclip.weights.state_dicts import to_openai

WEIGHTS = "open_clip_model.safetensors"


def write_open_clip(checkpoint: Checkpoint, directory: Path) -> str:
    """Write config and weights; open_clip's own tokenizer takes the context length from the config.

    Returns:
        How to load it.

    Raises:
        CheckpointError: the model is something that open_clip's CLIP is not.
    """
    config = {
        "model_cfg": model_config(checkpoint),
        "preprocess_cfg": {
            "mean": list(checkpoint.transform.mean),
            "std": list(checkpoint.transform.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (directory / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(to_openai(checkpoint.model.state_dict()), directory / WEIGHTS, metadata={"format": "pt"})
    return 'open_clip.create_model_and_transforms("local-dir:{path}")'


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `model_cfg` of an `open_clip_config.json`; raises a `CheckpointError` like `write_open_clip`."""
    config = checkpoint.model.config
    activation = require_clip(config)
    text, vision = config.text_config, config.vision_config
    head_width, rest = divmod(vision.hidden_size, vision.num_attention_heads)
    require(rest == 0, f"{vision.num_attention_heads} heads in a width of {vision.hidden_size}", "heads of one width")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": head_width,
            "mlp_ratio": _mlp_ratio(vision.hidden_size, vision.intermediate_size),
        },
        "text_cfg": {
            "context_length": checkpoint.context_length,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": _mlp_ratio(text.hidden_size, text.intermediate_size),
        },
    }


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """The ratio of which open_clip makes `mlp_width` again, by `int(width * ratio)`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
