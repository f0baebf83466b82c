"""The `config.json` of a Hugging Face CLIP, or of its text encoder, next to its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPTextConfig

from longclip.errors import CheckpointError
from longclip.weights.shapes import Hints

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OTHER_WEIGHTS = ("model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that transformers reads only on request."""
_TEXT_ENCODER = "clip_text_model"  # model_type of CLIPTextModel and CLIPTextModelWithProjection


def is_text_encoder(directory: Path) -> bool:
    """Whether a directory holds a text encoder alone, as diffusers pipelines have one."""
    try:
        saved = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        return saved.get("model_type") == _TEXT_ENCODER
    except (AttributeError, OSError, ValueError):
        return False


def read_hints(saved: Mapping[str, Any]) -> Hints:
    """What a `config.json` says; raises a `CheckpointError` if it is not of a CLIP or a CLIP text encoder."""
    kind = saved.get("model_type")
    if kind == _TEXT_ENCODER:
        tower = CLIPTextConfig.from_dict(dict(saved))
        return Hints(activation=tower.hidden_act, text_heads=tower.num_attention_heads)
    if kind != "clip":
        raise CheckpointError(f"{CONFIG} next to it is of a '{kind}' model, not of a CLIP")
    config = CLIPConfig.from_dict(dict(saved))
    text, vision = config.text_config, config.vision_config
    return Hints(
        activation=text.hidden_act,
        image_size=vision.image_size,
        vision_heads=vision.num_attention_heads,
        text_heads=text.num_attention_heads,
    )
