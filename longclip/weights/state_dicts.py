"""Names and shapes of CLIP weights: between OpenAI's layout, which open_clip and Long-CLIP share, and Hugging Face's.

Names of weights are those of openai/CLIP `clip/model.py`, of beichenzbc/Long-CLIP `model/model_longclip.py` and of
open_clip `model.py` (`CLIP` and `CustomTextCLIP`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPConfig

from longclip.errors import CheckpointError
from longclip.stretch import KEPT_POSITIONS

VOCAB_SIZE = 49408
START_TOKEN, END_TOKEN = 49406, 49407
ACTIVATIONS = ("quick_gelu", "gelu")

SIGLIP_REASON = (
    "a SigLIP is no CLIP: its text tower looks in both directions and is read at the last of a fixed number of padded"
    " positions, not at the end token, so that more positions change what every text means"
)

StateDict = Mapping[str, Tensor]

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_RESIDUAL_POSITIONS = "positional_embedding_res"

# Width of a vision attention head where it is not 64: open_clip's g/14, H/14 and bigG/14.
VISION_HEAD_WIDTH = {1408: 88, 1280: 80, 1664: 104}
HEAD_WIDTH = 64

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
_TRANSPOSED = ("text_projection", "visual.proj")  # plain matrices there, Linear layers here
_LAYER_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}


@dataclass(frozen=True)
class ModelHints:
    """What shapes of weights cannot tell. None: not known, take what OpenAI's models have."""

    activation: str | None = None
    image_size: int | None = None
    vision_heads: int | None = None
    vision_head_width: int | None = None
    """Where the number of heads follows from the width."""
    text_heads: int | None = None


def bare_names(state: StateDict) -> dict[str, Tensor]:
    """The same weights without what training wrappers and open_clip's `CustomTextCLIP` put in front of names, and with
    the `text_model.` that a `CLIPTextModel` saved by transformers 5 lacks."""
    names = dict(state)
    for prefix in _WRAPPERS * 2:
        if names and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    if "text.token_embedding.weight" in names:
        names = {name.removeprefix("text."): tensor for name, tensor in names.items()}
    if "embeddings.token_embedding.weight" in names:
        names = {f"text_model.{name}": tensor for name, tensor in names.items()}
    return names


def detect_layout(state: StateDict) -> str:
    """`openai`, `long-clip`, `huggingface` or `text-encoder`, by the names of bare weights.

    Raises:
        CheckpointError: the weights are of something else; CLIPs that cannot be converted are told why.
    """
    if any(name.startswith("visual.layer1.") for name in state):
        raise CheckpointError("a ResNet CLIP (RN50, ...) cannot be converted: Hugging Face CLIP has only ViT towers")
    if any(name.endswith((".head.probe", "_pool.probe", "_pool.latent")) for name in state):
        raise CheckpointError(SIGLIP_REASON)
    if any(name.startswith(("visual.trunk.", "text.transformer.")) for name in state):
        raise CheckpointError("an open_clip model with a timm or Hugging Face tower is no CLIP of the original layout")
    if any(name.startswith("vision_model.") for name in state):
        return "huggingface"
    if any(name.startswith("text_model.") for name in state):
        return "text-encoder"
    if "visual.conv1.weight" in state and "token_embedding.weight" in state:
        return "long-clip" if _RESIDUAL_POSITIONS in state else "openai"
    raise CheckpointError(f"the weights are of no CLIP; they begin with {_some(state)}")


def to_huggingface(state: StateDict) -> dict[str, Tensor]:
    """Weights under the names, and in the shapes, of `transformers.CLIPModel`, in float32.

    Long-CLIP's two position tables become one: rows 0 to 19 of the frozen table, the others of the trained one. The
    mapping is linear, so it takes gradients as well as weights.

    Args:
        state: bare weights of any layout but `text-encoder`.

    Raises:
        CheckpointError: weights are missing, or there are unknown ones.
    """
    if detect_layout(state) == "huggingface":
        return {name: _own_float(tensor) for name, tensor in state.items() if not name.endswith(".position_ids")}
    state = {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}
    if _RESIDUAL_POSITIONS in state:
        state["positional_embedding"] = _merge_positions(state)
        del state[_RESIDUAL_POSITIONS]

    layers = {tower: _count_layers(state, f"{there}.resblocks.") for tower, there in _TOWERS.items()}
    names, in_projections = _paired_names(layers)
    require_names(state, [*names.values(), *in_projections.values()])

    result = {name: _own_float(state[source_name]) for name, source_name in names.items()}
    for name, source_name in _TOWER_NAMES.items():
        if source_name in _TRANSPOSED:
            result[name] = _own_float(state[source_name].mT) if state[source_name].ndim == 2 else result[name]
    for name, source_name in in_projections.items():
        if state[source_name].ndim == 0 or len(state[source_name]) % 3:
            raise CheckpointError(f"weight {source_name} is not made of three parts: {tuple(state[source_name].shape)}")
        for part, tensor in zip("qkv", state[source_name].chunk(3), strict=True):
            result[name % part] = _own_float(tensor)
    if result["logit_scale"].numel() == 1:  # open_clip can hold it as [1]
        result["logit_scale"] = result["logit_scale"].reshape(())
    return result


def to_openai(state: StateDict) -> dict[str, Tensor]:
    """Weights of a `transformers.CLIPModel` under the names, and in the shapes, of OpenAI's layout.

    The inverse of `to_huggingface` for the layouts `openai` and `huggingface`, bit for bit. Tensors that need no new
    shape share their memory with `state`.
    """
    layers = {tower: _count_layers(state, f"{tower}.encoder.layers.") for tower in _TOWERS}
    names, in_projections = _paired_names(layers)
    result = {there: state[here] for here, there in names.items()}
    result |= {name: result[name].mT.contiguous() for name in _TRANSPOSED}
    for here, there in in_projections.items():
        result[there] = torch.cat([state[here % part] for part in "qkv"])
    return result


def split_positions(state: StateDict) -> dict[str, Tensor]:
    """Weights in OpenAI's layout with the two position tables of the official Long-CLIP code.

    That code reads rows 0 to 19 of the frozen table and the others of the trained one. Both are given the whole table,
    so that it makes no difference what its masks choose.
    """
    return {**state, _RESIDUAL_POSITIONS: state["positional_embedding"].clone()}


def _paired_names(layers: Mapping[str, int]) -> tuple[dict[str, str], dict[str, str]]:
    """OpenAI's names by Hugging Face's, for towers of so many layers: of weights that correspond one to one, and of
    those that hold query, key and value (`%s`) in one."""
    names, in_projections = dict(_TOWER_NAMES), {}
    for tower, there_tower in _TOWERS.items():
        for layer in range(layers[tower]):
            here, there = f"{tower}.encoder.layers.{layer}", f"{there_tower}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                names |= {f"{here}.{new}.{kind}": f"{there}.{old}.{kind}" for new, old in _LAYER_NAMES.items()}
                in_projections[f"{here}.self_attn.%s_proj.{kind}"] = f"{there}.attn.in_proj_{kind}"
    return names, in_projections


def require_names(state: StateDict, expected: Iterable[str]) -> None:
    """Raise a `CheckpointError` that names up to three weights too few or too many."""
    expected = set(expected)
    if missing := expected - state.keys():
        raise CheckpointError(f"{len(missing)} weights are missing: {_some(sorted(missing))}")
    if unknown := state.keys() - expected:
        raise CheckpointError(f"{len(unknown)} weights are no part of a CLIP: {_some(sorted(unknown))}")


def infer_config(state: StateDict, activation: str, hints: ModelHints | None = None) -> CLIPConfig:
    """The configuration of weights in Hugging Face's layout, by their shapes.

    Args:
        state: result of `to_huggingface`.
        activation: `quick_gelu` or `gelu`: the one thing that no shape tells.
        hints: what is known besides. Heads are otherwise 64 wide, or as wide as in open_clip's models of that width.

    Raises:
        CheckpointError: shapes contradict each other, or the vocabulary is not CLIP's.
    """
    hints = hints or ModelHints()
    vocab_size, text_width = _shape(state, "text_model.embeddings.token_embedding.weight", 2)
    context_length, _ = _shape(state, "text_model.embeddings.position_embedding.weight", 2)
    embedding_dim, _ = _shape(state, "text_projection.weight", 2)
    vision_width, _, patch_size, _ = _shape(state, "vision_model.embeddings.patch_embedding.weight", 4)
    rows, _ = _shape(state, "vision_model.embeddings.position_embedding.weight", 2)
    grid = math.isqrt(rows - 1)
    if grid * grid != rows - 1:
        raise CheckpointError(f"{rows} image positions are no square grid and one class token")
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


def _tower_config(state: StateDict, tower: str, width: int, heads: int) -> dict[str, int]:
    if width % heads:
        raise CheckpointError(f"{tower}: width {width} cannot be shared among {heads} attention heads")
    mlp_width, _ = _shape(state, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2)
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": _count_layers(state, f"{tower}.encoder.layers."),
        "num_attention_heads": heads,
    }


def _shape(state: StateDict, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"1 weights are missing: {name}")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"weight {name} has shape {shape}, expected {dimensions} dimensions")
    return shape


def _count_layers(state: StateDict, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    # Distinct numbers, not the largest: a gap shows as missing weights, and a wild number costs nothing.
    return len({found[1] for found in map(pattern.match, state) if found})


def _merge_positions(state: StateDict) -> Tensor:
    frozen, trained = state["positional_embedding"], state[_RESIDUAL_POSITIONS]
    if frozen.ndim != 2 or frozen.shape != trained.shape:
        raise CheckpointError(
            f"positional_embedding {tuple(frozen.shape)} and {_RESIDUAL_POSITIONS} {tuple(trained.shape)} differ"
        )
    return torch.cat([frozen[:KEPT_POSITIONS], trained[KEPT_POSITIONS:]])


def _own_float(tensor: Tensor) -> Tensor:
    # A copy of its own: safetensors refuses to save tensors that share memory, as the parts of in_proj do.
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
