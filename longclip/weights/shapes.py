"""The configuration of a CLIP from the shapes of its weights, in Hugging Face's layout, and a model made of both."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from longclip.checkpoint import require_finite, some
from longclip.constants import END_TOKEN, START_TOKEN, VOCAB_SIZE
from longclip.errors import CheckpointError
from longclip.images import CLIP_MEAN, CLIP_STD

StateDict = Mapping[str, Tensor]

HEAD_WIDTH = 64
VISION_HEAD_WIDTH = {1408: 88, 1280: 80, 1664: 104}
"""Width of an image attention head by the tower's width where it is not 64: open_clip's g/14, H/14 and bigG/14."""


@dataclass(frozen=True)
class Hints:
    """What names and shapes of weights do not say, read from a config file next to them.

    The defaults are those of OpenAI's models; None means unknown.
    """

    source_format: str | None = None
    """Name of the format if the config file decides it, not the weights."""
    activation: str | None = None
    image_size: int | None = None
    vision_heads: int | None = None
    vision_head_width: int | None = None
    """Used when `vision_heads` is unknown: the number of heads then follows from the width."""
    text_heads: int | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def infer_config(state: StateDict, activation: str, hints: Hints | None = None) -> CLIPConfig:
    """The configuration of weights in Hugging Face's layout, from their shapes.

    Args:
        state: result of `to_huggingface`.
        activation: `quick_gelu` or `gelu`; no shape implies it.
        hints: what a config file says. By default heads are 64 wide, or as wide as in open_clip's models of that width.

    Raises:
        CheckpointError: shapes contradict each other, or the vocabulary is not CLIP's.
    """
    hints = hints or Hints()
    vocab_size, text_width = _shape(state, "text_model.embeddings.token_embedding.weight", 2)
    context_length, _ = _shape(state, "text_model.embeddings.position_embedding.weight", 2)
    embedding_dim, _ = _shape(state, "text_projection.weight", 2)
    vision_width, _, patch_size, _ = _shape(state, "vision_model.embeddings.patch_embedding.weight", 4)
    rows, _ = _shape(state, "vision_model.embeddings.position_embedding.weight", 2)
    grid = math.isqrt(rows - 1)
    if grid * grid != rows - 1:
        raise CheckpointError(f"{rows} image positions are not a square grid plus one class token")
    if vocab_size != VOCAB_SIZE:
        raise CheckpointError(f"the vocabulary has {vocab_size} tokens, not the {VOCAB_SIZE} of CLIP's tokenizer")
    image_size = hints.image_size or grid * patch_size
    if image_size // patch_size != grid:
        raise CheckpointError(f"image size {image_size} does not fit {grid} x {grid} patches of {patch_size} pixels")
    head_width = hints.vision_head_width or VISION_HEAD_WIDTH.get(vision_width, HEAD_WIDTH)
    vision_heads = hints.vision_heads or max(1, vision_width // head_width)
    text_heads = hints.text_heads or max(1, text_width // HEAD_WIDTH)
    return CLIPConfig(
        text_config={
            **_tower_config(state, "text_model", text_width, text_heads),
            "hidden_act": activation,
            "projection_dim": embedding_dim,
            "max_position_embeddings": context_length,
            "vocab_size": vocab_size,
            "bos_token_id": START_TOKEN,
            # Not the 2 of OpenAI's conversions: with the real id the feature is read at the first end token.
            "eos_token_id": END_TOKEN,
            "pad_token_id": 0,
        },
        vision_config={
            **_tower_config(state, "vision_model", vision_width, vision_heads),
            "hidden_act": activation,
            "projection_dim": embedding_dim,
            "image_size": image_size,
            "patch_size": patch_size,
        },
        projection_dim=embedding_dim,
    )


def build_model(state: StateDict, config: CLIPConfig) -> CLIPModel:
    """A CLIP in evaluation mode with these weights.

    Raises:
        CheckpointError: weights are missing, unknown, NaN, infinite, or of a shape that contradicts the other weights.
    """
    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    require_names(state, expected)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the other weights require {tuple(expected[name].shape)}"
            raise CheckpointError(f"weight {name} has shape {shapes}")
    require_finite(state)
    # Unlike CLIPModel(config), this does not draw random weights first, which takes 11 of 12 s for a ViT-L/14.
    return CLIPModel.from_pretrained(None, config=config, state_dict=dict(state)).eval()


def require_names(state: StateDict, expected: Iterable[str]) -> None:
    """Raise a `CheckpointError` that names up to three missing or unknown weights."""
    expected = set(expected)
    if missing := expected - state.keys():
        raise CheckpointError(f"{len(missing)} weights are missing: {some(sorted(missing))}")
    if unknown := state.keys() - expected:
        raise CheckpointError(f"{len(unknown)} weights are not part of a CLIP: {some(sorted(unknown))}")


def _tower_config(state: StateDict, tower: str, width: int, heads: int) -> dict[str, int]:
    if width % heads:
        raise CheckpointError(f"{tower}: width {width} cannot be shared among {heads} attention heads")
    mlp_width, _ = _shape(state, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2)
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": count_layers(state, f"{tower}.encoder.layers."),
        "num_attention_heads": heads,
    }


def _shape(state: StateDict, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"1 weights are missing: {name}")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"weight {name} has shape {shape}, expected {dimensions} dimensions")
    return shape


def count_layers(state: StateDict, prefix: str) -> int:
    """Number of layers: of the numbers that follow `prefix` in the names of weights."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    # Distinct numbers, not the largest one: a gap shows up as missing weights, and a huge number costs nothing.
    return len({match[1] for match in map(pattern.match, state) if match})
