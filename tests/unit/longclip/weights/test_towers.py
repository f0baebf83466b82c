"""Every published tower: its names, shapes and heads in each format, without the memory for its weights."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from longclip.checkpoint import Checkpoint
from longclip.images import ImageTransform
from longclip.tokenizer import build_tokenizer
from longclip.weights.layouts import to_huggingface
from longclip.weights.limits import require_openai_tower_shapes
from longclip.weights.open_clip import model_config
from longclip.weights.openai import to_openai
from longclip.weights.shapes import infer_config
from tests.support.consumers import open_clip_folder

# By open_clip's names: image tower (width, MLP width, layers, heads, patch, side), text tower (width, layers, heads),
# width of the embedding.
TOWERS = {
    "ViT-B-32": ((768, 3072, 12, 12, 32, 224), (512, 12, 8), 512),
    "ViT-B-16": ((768, 3072, 12, 12, 16, 224), (512, 12, 8), 512),
    "ViT-L-14": ((1024, 4096, 24, 16, 14, 224), (768, 12, 12), 768),
    "ViT-L-14-336": ((1024, 4096, 24, 16, 14, 336), (768, 12, 12), 768),
    "ViT-H-14": ((1280, 5120, 32, 16, 14, 224), (1024, 24, 16), 1024),
    "ViT-bigG-14": ((1664, 8192, 48, 16, 14, 224), (1280, 32, 20), 1280),
}


def published_clip(name: str, context_length: int = 248) -> Checkpoint:
    """A CLIP of a published shape whose weights take no memory."""
    (width, mlp_width, layers, heads, patch, side), (text_width, text_layers, text_heads), dim = TOWERS[name]
    config = CLIPConfig(
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "max_position_embeddings": context_length,
            "hidden_act": "gelu",
            "eos_token_id": 49407,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": mlp_width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": side,
            "hidden_act": "gelu",
        },
        projection_dim=dim,
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    return Checkpoint(model, build_tokenizer(context_length), ImageTransform(side))


@pytest.mark.parametrize("name", TOWERS)
def test_layouts_are_inverse_and_give_the_configuration(name: str) -> None:
    checkpoint = published_clip(name)
    state = checkpoint.model.state_dict()
    back = to_huggingface(to_openai(state))
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in state.items()}
    inferred, config = infer_config(back, "gelu"), checkpoint.model.config
    for tower in ("text_config", "vision_config"):
        found, expected = getattr(inferred, tower).to_dict(), getattr(config, tower).to_dict()
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert found[key] == expected[key]
    assert inferred.vision_config.image_size == config.vision_config.image_size
    assert inferred.projection_dim == config.projection_dim


@pytest.mark.parametrize("name", TOWERS)
def test_config_equals_open_clip_except_for_its_length(name: str) -> None:
    path = open_clip_folder() / "open_clip" / "model_configs" / f"{name}.json"
    theirs, ours = json.loads(path.read_text()), model_config(published_clip(name))
    assert ours["text_cfg"].pop("context_length") == 248
    assert theirs["text_cfg"].pop("context_length") == 77
    for config in (theirs, ours):
        for tower in ("text_cfg", "vision_cfg"):
            config[tower]["mlp"] = int(config[tower]["width"] * config[tower].pop("mlp_ratio", 4.0))
        config["vision_cfg"].setdefault("head_width", 64)
        config.setdefault("quick_gelu", False)
    assert ours == theirs


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"])
def test_shapes_match_the_code_of_openai(name: str) -> None:
    require_openai_tower_shapes(published_clip(name).model.config)
