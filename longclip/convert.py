"""Convert CLIP weights of any common form to a Hugging Face directory, and stretch them to 248 tokens.

    python -m longclip.convert ViT-B-16.pt checkpoints/base --stretch

Files are recognised by what is in them, not by their name.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from longclip.checkpoint import MANIFEST, Checkpoint, load_checkpoint, save_checkpoint
from longclip.command_line import run_command
from longclip.errors import CheckpointError, ConfigError
from longclip.files import file_sha256
from longclip.images import CLIP_MEAN, CLIP_STD, ImageTransform
from longclip.state_dicts import (
    ACTIVATIONS,
    ModelHints,
    StateDict,
    bare_names,
    detect_layout,
    infer_config,
    require_names,
    to_huggingface,
)
from longclip.stretch import KEPT_POSITIONS, STRETCH_FACTOR, replace_positions, stretch_positions, text_positions
from longclip.tokenizer import build_tokenizer
from longclip.weight_files import read_tensors

ORIGINAL_POSITIONS = 77

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HUGGING_FACE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TORCH_WEIGHTS = "pytorch_model.bin"
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

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
}


@dataclass(frozen=True)
class Conversion:
    """A converted CLIP, and what was found out about its source."""

    checkpoint: Checkpoint
    source_format: str
    """`openai`, `long-clip`, `open_clip` or `huggingface`."""
    weights: Path | None
    """The file that the weights came from; None for a hub name or for weights in several files."""
    activation_assumed: bool
    """Whether nothing told the activation, so that OpenAI's was taken."""


@dataclass(frozen=True)
class _Companion:
    """What a config file beside the weights says."""

    source_format: str | None = None
    hints: ModelHints = field(default_factory=ModelHints)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def convert_checkpoint(source: str | Path, activation: str | None = None) -> Checkpoint:
    """Load a CLIP from whatever holds one.

    Args:
        source: a weights file (OpenAI, TorchScript or not; official Long-CLIP; open_clip; Hugging Face), a directory of
            open_clip or Hugging Face, or a hub name.
        activation: `quick_gelu` or `gelu`, for weights without a config that tells; `quick_gelu` where None.

    Returns:
        The CLIP in float32 and evaluation mode.

    Raises:
        CheckpointError: nothing is there, it is no CLIP, it is damaged, or reading it would run foreign Python code.
        ConfigError: `activation` is unknown or contradicts the source's config.
    """
    return read_source(source, activation).checkpoint


def stretch_checkpoint(
    checkpoint: Checkpoint, kept_positions: int = KEPT_POSITIONS, stretch_factor: int = STRETCH_FACTOR
) -> Checkpoint:
    """Stretch the text positions of a CLIP (see `stretch_positions`): 77 become 248.

    Args:
        checkpoint: a CLIP of at most 77 positions; its model is changed in place.
        kept_positions: position rows that stay as they are.
        stretch_factor: rows made out of each other row.

    Returns:
        The same model with a tokenizer of its new context length.

    Raises:
        CheckpointError: the model is stretched already.
        ConfigError: one of the numbers is out of range.
    """
    if checkpoint.context_length > ORIGINAL_POSITIONS:
        raise CheckpointError(
            f"the model has {checkpoint.context_length} text positions already, and stretching starts from at most"
            f" {ORIGINAL_POSITIONS}; leave stretching out to use it as it is"
        )
    try:
        table = stretch_positions(text_positions(checkpoint.model).detach(), kept_positions, stretch_factor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    replace_positions(checkpoint.model, table)
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    tokenizer.model_max_length = table.shape[0]
    return Checkpoint(checkpoint.model, tokenizer, checkpoint.transform)


def read_source(source: str | Path, activation: str | None = None) -> Conversion:
    """Like `convert_checkpoint`, with what was found out on the way."""
    if activation not in (None, *ACTIVATIONS):
        raise ConfigError(f"activation '{activation}' is unknown; allowed are {', '.join(ACTIVATIONS)}")
    path = Path(source).expanduser()
    weights = _find_weights(path) if path.is_dir() else path
    if weights is None or not (weights.exists() or path.suffix in _WEIGHT_SUFFIXES):
        return _read_hugging_face(source, activation)
    if not weights.is_file():
        raise CheckpointError(f"weights '{source}': no such file")
    try:
        return _read_weights(weights, activation)
    except CheckpointError as error:
        raise CheckpointError(f"weights '{weights}': {error}") from error


def _find_weights(directory: Path) -> Path | None:
    """The one weights file of a directory that is no complete Hugging Face one; None for one that is."""
    complete = (directory / "config.json").is_file()
    if complete and any((directory / name).is_file() for name in _HUGGING_FACE_WEIGHTS):
        return None
    for name in (*_OPEN_CLIP_WEIGHTS, _TORCH_WEIGHTS):
        if (directory / name).is_file():
            return directory / name
    if complete:
        return None
    names = ", ".join((*_HUGGING_FACE_WEIGHTS[:1], *_OPEN_CLIP_WEIGHTS, _TORCH_WEIGHTS))
    raise CheckpointError(f"directory '{directory}' holds no weights; looked for {names}, or give the file itself")


def _read_hugging_face(source: str | Path, activation: str | None) -> Conversion:
    path = Path(source).expanduser()
    checkpoint = load_checkpoint(path if path.is_dir() else source)
    _choose_activation(activation, checkpoint.model.config.text_config.hidden_act)
    weights = path / _HUGGING_FACE_WEIGHTS[0]
    return Conversion(checkpoint, "huggingface", weights if weights.is_file() else None, False)


def _read_weights(weights: Path, activation: str | None) -> Conversion:
    state = bare_names(read_tensors(weights))
    layout = detect_layout(state)
    companion = _read_companion(weights.parent, layout)
    chosen, assumed = _choose_activation(activation, companion.hints.activation)
    converted = to_huggingface(state)
    model = _build_model(converted, infer_config(converted, chosen, companion.hints))
    config = model.config
    checkpoint = Checkpoint(
        model,
        build_tokenizer(config.text_config.max_position_embeddings),
        ImageTransform(config.vision_config.image_size, companion.mean, companion.std),
    )
    return Conversion(checkpoint, companion.source_format or layout, weights, assumed)


def _choose_activation(requested: str | None, known: str | None) -> tuple[str, bool]:
    """The activation, and whether it had to be assumed."""
    if requested and known and requested != known:
        raise ConfigError(f"activation '{requested}' contradicts the source's config, which has '{known}'")
    return requested or known or ACTIVATIONS[0], not (requested or known)


def _read_companion(directory: Path, layout: str) -> _Companion:
    path = directory / ("config.json" if layout == "huggingface" else _OPEN_CLIP_CONFIG)
    if layout == "long-clip" or not path.is_file():
        return _Companion()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return _hugging_face_companion(saved) if layout == "huggingface" else _open_clip_companion(saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make sense of {path.name} beside it: {error!r}") from error


def _hugging_face_companion(saved: Mapping[str, Any]) -> _Companion:
    if saved.get("model_type") != "clip":
        raise CheckpointError(f"config.json beside it is of a '{saved.get('model_type')}' model, not of a CLIP")
    config = CLIPConfig.from_dict(saved)
    text, vision = config.text_config, config.vision_config
    hints = ModelHints(text.hidden_act, vision.image_size, vision.num_attention_heads, text.num_attention_heads)
    return _Companion(hints=hints)


def _open_clip_companion(saved: Mapping[str, Any]) -> _Companion:
    model, preprocess = saved["model_cfg"], saved.get("preprocess_cfg") or {}
    for tower, options in _OPEN_CLIP_REQUIRED.items():
        for option, allowed in options.items():
            value = model[tower].get(option)
            if value not in allowed:
                raise CheckpointError(f"{_OPEN_CLIP_CONFIG}: {tower}.{option} = {value!r} is something CLIP cannot do")
    vision, text = model["vision_cfg"], model["text_cfg"]
    side = vision.get("image_size")
    hints = ModelHints(
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        image_size=side[0] if isinstance(side, list) else side,
        vision_heads=vision["width"] // vision.get("head_width", 64),
        text_heads=text.get("heads"),
    )
    mean, std = preprocess.get("mean") or CLIP_MEAN, preprocess.get("std") or CLIP_STD
    return _Companion("open_clip", hints, tuple(mean), tuple(std))


def _build_model(state: StateDict, config: CLIPConfig) -> CLIPModel:
    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    require_names(state, expected)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the others ask for {tuple(expected[name].shape)}"
            raise CheckpointError(f"weight {name} has shape {shapes}")
    # Unlike CLIPModel(config), this draws no random weights first: 11 s of 12 for a ViT-L/14.
    return CLIPModel.from_pretrained(None, config=config, state_dict=dict(state)).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> str:
    started = time.perf_counter()
    target = Path(options.target)
    _require_free(target, Path(options.source), options.overwrite)
    conversion = read_source(options.source, options.activation)
    checkpoint = conversion.checkpoint
    source_positions = checkpoint.context_length
    metadata: dict[str, Any] = {
        "origin": "convert",
        "source": Path(options.source).name if conversion.weights else options.source,
        "source_format": conversion.source_format,
        "source_sha256": file_sha256(conversion.weights) if conversion.weights else None,
        "stretch": None,
    }
    if options.stretch:
        checkpoint = stretch_checkpoint(checkpoint, options.kept_positions, options.stretch_factor)
        metadata["stretch"] = {
            "source_positions": source_positions,
            "kept_positions": options.kept_positions,
            "stretch_factor": options.stretch_factor,
        }
    save_checkpoint(checkpoint, target, metadata)

    config = checkpoint.model.config
    activation = config.text_config.hidden_act
    if conversion.activation_assumed:
        activation += " (assumed, see --activation)"
    return (
        f"{conversion.source_format} -> {target}: {source_positions} -> {checkpoint.context_length} positions,"
        f" text width {config.text_config.hidden_size}, image width {config.vision_config.hidden_size},"
        f" embedding {config.projection_dim}, {config.vision_config.image_size} px, {activation},"
        f" {time.perf_counter() - started:.1f} s"
    )


def _require_free(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse a destination that would destroy something, before any work is done."""
    if not target.exists():
        return
    if not overwrite:
        raise ConfigError(f"destination '{target}' exists; choose another one, or replace it with --overwrite")
    if not (target / MANIFEST).is_file():
        raise ConfigError(f"destination '{target}' is no checkpoint of ours (no {MANIFEST}) and is not overwritten")
    if source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"destination '{target}' holds the source '{source}'; choose another one")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longclip.convert",
        description="Convert CLIP weights to a Hugging Face directory, and stretch them to long texts.",
        epilog="""\
sources, recognised by their content:
  OpenAI      ViT-B-16.pt and the like, TorchScript or state dict
  Long-CLIP   longclip-B.pt of the official code: 248 positions, nothing to stretch
  open_clip   a weights file, a training checkpoint, or a directory with open_clip_config.json
  Hugging Face  a CLIP directory, a weights file of one, or a hub name such as openai/clip-vit-base-patch16

examples:
  python -m longclip.convert ViT-B-16.pt checkpoints/base --stretch      # 77 -> 248 positions, ready to fine-tune
  python -m longclip.convert longclip-B.pt checkpoints/longclip-b        # official Long-CLIP, ready to serve
  python -m longclip.convert open_clip_model.safetensors out --activation gelu

exit status: 0 done, 2 wrong option or destination, 4 source cannot be used, 1 anything else.
Reading weights runs no code that is in them, neither pickled nor TorchScript.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="weights file, directory or hub name")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument("--stretch", action="store_true", help="stretch the text positions: 77 become 248")
    parser.add_argument(
        "--kept-positions",
        type=int,
        default=KEPT_POSITIONS,
        metavar="N",
        help="first positions that stay as they are (default %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--stretch-factor",
        type=int,
        default=STRETCH_FACTOR,
        metavar="N",
        help="positions made out of each other one (default %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="of weights whose config does not tell: quick_gelu for OpenAI's and Long-CLIP (default), gelu for most"
        " models that open_clip trained itself",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    return parser


if __name__ == "__main__":
    sys.exit(main())
