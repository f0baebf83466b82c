"""OpenAI's layout of CLIP weights, which open_clip shares, and files that the code of openai/CLIP loads.

Names of weights are those of openai/CLIP `clip/model.py` and of open_clip `model.py` (`CLIP` and `CustomTextCLIP`).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longclip.checkpoint import Checkpoint
from longclip.constants import CLIP_CONTEXT_LENGTH
from longclip.errors import CheckpointError
from longclip.weights.limits import require, require_openai_code
from longclip.weights.shapes import VISION_HEAD_WIDTH, StateDict, count_layers, require_names

_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_TOWER_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # plain matrices in OpenAI's layout, Linear layers in Hugging Face's
_LAYER_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}


def from_openai(state: StateDict) -> dict[str, Tensor]:
    """Weights in OpenAI's layout under the names, and in the shapes, of `transformers.CLIPModel`, in float32.

    Raises:
        CheckpointError: weights are missing or unknown.
    """
    state = {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}
    layers = {tower: count_layers(state, f"{openai_tower}.resblocks.") for tower, openai_tower in _TOWERS.items()}
    names, in_projections = _paired_names(layers)
    require_names(state, [*names.values(), *in_projections.values()])

    result = {name: own_float(state[source_name]) for name, source_name in names.items()}
    for name, source_name in _TOWER_NAMES.items():
        if source_name in _TRANSPOSED and state[source_name].ndim == 2:
            result[name] = own_float(state[source_name].mT)
    for name, source_name in in_projections.items():
        if state[source_name].ndim == 0 or len(state[source_name]) % 3:
            raise CheckpointError(
                f"weight {source_name} does not have three parts: its shape is {tuple(state[source_name].shape)}"
            )
        for part, tensor in zip("qkv", state[source_name].chunk(3), strict=True):
            result[name % part] = own_float(tensor)
    if result["logit_scale"].numel() == 1:  # open_clip may store it as [1]
        result["logit_scale"] = result["logit_scale"].reshape(())
    return result


def to_openai(state: StateDict) -> dict[str, Tensor]:
    """Weights of a `transformers.CLIPModel` under the names, and in the shapes, of OpenAI's layout.

    The exact inverse of `from_openai` in float32. Tensors whose shape stays the same share their memory with `state`.
    """
    layers = {tower: count_layers(state, f"{tower}.encoder.layers.") for tower in _TOWERS}
    names, in_projections = _paired_names(layers)
    result = {openai_name: state[name] for name, openai_name in names.items()}
    result |= {openai_name: result[openai_name].mT.contiguous() for openai_name in _TRANSPOSED}
    for name, openai_name in in_projections.items():
        result[openai_name] = torch.cat([state[name % part] for part in "qkv"])
    return result


def _paired_names(layers: Mapping[str, int]) -> tuple[dict[str, str], dict[str, str]]:
    """OpenAI's names by Hugging Face's, for towers with these numbers of layers.

    Returns:
        The weights that correspond one to one, and those that hold query, key and value (`%s`) in one tensor.
    """
    names, in_projections = dict(_TOWER_NAMES), {}
    for tower, openai_tower in _TOWERS.items():
        for layer in range(layers[tower]):
            new, old = f"{tower}.encoder.layers.{layer}", f"{openai_tower}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                names |= {
                    f"{new}.{part}.{kind}": f"{old}.{openai_part}.{kind}" for part, openai_part in _LAYER_NAMES.items()
                }
                in_projections[f"{new}.self_attn.%s_proj.{kind}"] = f"{old}.attn.in_proj_{kind}"
    return names, in_projections


def own_float(tensor: Tensor) -> Tensor:
    """A float32 copy. safetensors refuses to save tensors that share memory, as the parts of `in_proj` do."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def write(checkpoint: Checkpoint, file: Path) -> str:
    """Write a state dict in OpenAI's layout; `clip.load` does not need TorchScript, which OpenAI's downloads are.

    Returns:
        How to load it.

    Raises:
        CheckpointError: OpenAI's code would build a different model from these weights.
    """
    require_openai_code(checkpoint, CLIP_CONTEXT_LENGTH, "export a longer one with `--to long-clip` or another format")
    width = checkpoint.model.config.vision_config.hidden_size
    require(
        width not in VISION_HEAD_WIDTH,
        f"an image tower of width {width}",
        f"others: open_clip's files have the same layout and, at this width, heads of {VISION_HEAD_WIDTH.get(width)}",
    )
    torch.save(to_openai(checkpoint.model.state_dict()), file)
    return 'clip.load("{path}")'
