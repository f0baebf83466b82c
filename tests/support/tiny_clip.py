"""A CLIP small enough for any test, with the real vocabulary."""

from transformers import CLIPConfig

TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_config(context_length: int = 248) -> CLIPConfig:
    """A CLIP with the real vocabulary, some thousand other weights, and 32-pixel images."""
    return CLIPConfig(
        text_config={
            **TINY_TOWER,
            "max_position_embeddings": context_length,
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 0,
        },
        vision_config={**TINY_TOWER, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
