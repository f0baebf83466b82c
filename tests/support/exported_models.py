"""Fixtures: CLIPs whose every weight differs from its initial value, for tests of other software's formats."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig

from longclip.checkpoint import Checkpoint, new_model, save_checkpoint
from longclip.stretch import stretch_checkpoint

TEXTS = ["a photo of a cat", "one red circle " * 30, "a long description of a street " * 50, ""]
"""Short, longer than 77 tokens, longer than 248, and empty."""


def small_config(context_length: int = 77, activation: str = "quick_gelu", layers: int = 2) -> CLIPConfig:
    """A CLIP with heads and MLPs as wide as OpenAI's code has them."""
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": layers}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": layers}
    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
    return CLIPConfig(
        text_config={**text, **tokens, "max_position_embeddings": context_length, "hidden_act": activation},
        vision_config={**vision, "image_size": 48, "patch_size": 8, "hidden_act": activation},
        projection_dim=32,
    )


def random_clip(config: CLIPConfig, seed: int = 0, noise: float = 0.1) -> Checkpoint:
    """A CLIP with no weight of 0 or 1, as layer norms and biases have after initialisation: none can be mistaken."""
    torch.manual_seed(seed)
    checkpoint = new_model(config)
    with torch.no_grad():
        for weight in checkpoint.model.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    checkpoint.model.eval()
    return checkpoint


@pytest.fixture(scope="session")
def small_clip() -> Checkpoint:
    """A CLIP of 77 positions."""
    return random_clip(small_config())


@pytest.fixture(scope="session")
def small_long_clip() -> Checkpoint:
    """A CLIP stretched to 248 positions."""
    return stretch_checkpoint(random_clip(small_config()))


@pytest.fixture(scope="session")
def small_long_clip_dir(small_long_clip: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a directory."""
    directory = tmp_path_factory.mktemp("small") / "long-clip"
    save_checkpoint(small_long_clip, directory, {"origin": "test"})
    return directory
