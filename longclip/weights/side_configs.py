"""What a config file beside weights tells of them that their names and shapes do not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPTextConfig

from longclip.errors import CheckpointError
from longclip.images import CLIP_MEAN, CLIP_STD
from longclip.weights.state_dicts import HEAD_WIDTH, SIGLIP_REASON, ModelHints

OPEN_CLIP_CONFIG = "open_clip_config.json"
_HUGGING_FACE_CONFIG = "config.json"
_TEXT_ENCODER = "clip_text_model"  # model_type of CLIPTextModel and CLIPTextModelWithProjection

# Options of an open_clip config that change what the model computes without changing its weights' names, with the
# values that are CLIP's own. Anything else would convert into a model that is silently wrong.
_OPEN_CLIP_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
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


@dataclass(frozen=True)
class Companion:
    """What a config file beside the weights says. Without one, what holds for OpenAI's models."""

    source_format: str | None = None
    hints: ModelHints = field(default_factory=ModelHints)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def read_companion(directory: Path, layout: str) -> Companion:
    """Read the config file in `directory` that belongs to weights of a layout, if there is one.

    Raises:
        CheckpointError: it cannot be understood, or tells that the weights are of something that CLIP is not.
    """
    of_transformers = layout in ("huggingface", "text-encoder")
    path = directory / (_HUGGING_FACE_CONFIG if of_transformers else OPEN_CLIP_CONFIG)
    if layout == "long-clip":
        return Companion(hints=ModelHints(vision_head_width=HEAD_WIDTH))
    if not path.is_file():
        return Companion()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return _hugging_face_companion(saved) if of_transformers else _open_clip_companion(saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make sense of {path.name} beside it: {error!r}") from error


def is_text_encoder(directory: Path) -> bool:
    """Whether a directory is that of a text encoder alone, as a diffusers pipeline has one."""
    try:
        saved = json.loads((directory / _HUGGING_FACE_CONFIG).read_text(encoding="utf-8"))
        return saved.get("model_type") == _TEXT_ENCODER
    except (AttributeError, OSError, ValueError):
        return False


def _hugging_face_companion(saved: Mapping[str, Any]) -> Companion:
    kind = saved.get("model_type")
    if kind == _TEXT_ENCODER:
        tower = CLIPTextConfig.from_dict(dict(saved))
        return Companion(hints=ModelHints(tower.hidden_act, text_heads=tower.num_attention_heads))
    if kind != "clip":
        raise CheckpointError(f"{_HUGGING_FACE_CONFIG} beside it is of a '{kind}' model, not of a CLIP")
    config = CLIPConfig.from_dict(dict(saved))
    text, vision = config.text_config, config.vision_config
    hints = ModelHints(text.hidden_act, vision.image_size, vision.num_attention_heads, text.num_attention_heads)
    return Companion(hints=hints)


def _open_clip_companion(saved: Mapping[str, Any]) -> Companion:
    model, preprocess = saved["model_cfg"], saved.get("preprocess_cfg") or {}
    if "init_logit_bias" in model and model["text_cfg"].get("no_causal_mask"):
        raise CheckpointError(f"{OPEN_CLIP_CONFIG}: {SIGLIP_REASON}")
    for part, options in _OPEN_CLIP_REQUIRED.items():
        for option, allowed in options.items():
            value = {**model, "preprocess_cfg": preprocess}[part].get(option)
            if value not in allowed:
                raise CheckpointError(f"{OPEN_CLIP_CONFIG}: {part}.{option} = {value!r} is something CLIP cannot do")
    vision, text = model["vision_cfg"], model["text_cfg"]
    side = vision.get("image_size")
    hints = ModelHints(
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        image_size=side[0] if isinstance(side, list) else side,
        vision_heads=vision["width"] // vision.get("head_width", 64),
        text_heads=text.get("heads"),
    )
    mean, std = preprocess.get("mean") or CLIP_MEAN, preprocess.get("std") or CLIP_STD
    return Companion("open_clip", hints, tuple(mean), tuple(std))
