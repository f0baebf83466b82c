"""Directories that open_clip loads with `local-dir:`, and from the hub with `hf-hub:`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from longclip.checkpoint import SIGLIP_REASON, Checkpoint
from longclip.errors import CheckpointError
from longclip.images import CLIP_MEAN, CLIP_STD
from longclip.weights.limits import require, require_clip
from longclip.weights.openai import to_openai
from longclip.weights.shapes import HEAD_WIDTH, Hints

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Options that change what the model computes without changing its weights' names, and the values that CLIP has. With
# any other value the conversion would give a wrong model without an error.
_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision_cfg": {
        "timm_model_name": (None,),
        "global_average_pool": (None, False),
        "pool_type": (None, "tok"),
        "act_kwargs": (None, {}),
        "norm_kwargs": (None, {}),
    },
    "text_cfg": {
        "hf_model_name": (None,),
        "no_causal_mask": (None, False),
        "pool_type": (None, "argmax"),
        "act_kwargs": (None, {}),
        "norm_kwargs": (None, {}),
    },
    "preprocess_cfg": {
        "interpolation": (None, "bicubic", "random"),
        "resize_mode": (None, "shortest"),
    },
}


def read_hints(saved: Mapping[str, Any]) -> Hints:
    """What an `open_clip_config.json` says; raises a `CheckpointError` if its model is not a CLIP."""
    model, preprocess = saved["model_cfg"], saved.get("preprocess_cfg") or {}
    if "init_logit_bias" in model and model["text_cfg"].get("no_causal_mask"):
        raise CheckpointError(f"{CONFIG}: {SIGLIP_REASON}")
    for part, options in _REQUIRED.items():
        for option, allowed in options.items():
            value = {**model, "preprocess_cfg": preprocess}[part].get(option)
            if value not in allowed:
                raise CheckpointError(f"{CONFIG}: {part}.{option} = {value!r} is something CLIP cannot do")
    vision, text = model["vision_cfg"], model["text_cfg"]
    side = vision.get("image_size")
    return Hints(
        source_format="open_clip",
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        image_size=side[0] if isinstance(side, list) else side,
        vision_heads=vision["width"] // vision.get("head_width", HEAD_WIDTH),
        text_heads=text.get("heads"),
        mean=tuple(preprocess.get("mean") or CLIP_MEAN),
        std=tuple(preprocess.get("std") or CLIP_STD),
    )


def write(checkpoint: Checkpoint, directory: Path) -> str:
    """Write config and weights; open_clip's own tokenizer takes the context length from the config.

    Returns:
        How to load it.

    Raises:
        CheckpointError: open_clip's CLIP cannot be this model.
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
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(to_openai(checkpoint.model.state_dict()), directory / WEIGHTS[0], metadata={"format": "pt"})
    return 'open_clip.create_model_and_transforms("local-dir:{path}")'


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `model_cfg` of an `open_clip_config.json`; raises a `CheckpointError` like `write`."""
    config = checkpoint.model.config
    activation = require_clip(config)
    text, vision = config.text_config, config.vision_config
    head_width, rest = divmod(vision.hidden_size, vision.num_attention_heads)
    require(rest == 0, f"{vision.num_attention_heads} heads in a width of {vision.hidden_size}", "heads of equal width")
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
    """The ratio from which open_clip computes `mlp_width`, as `int(width * ratio)`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
