"""Convert CLIP weights of any common form to a Hugging Face directory, and stretch them to 248 tokens.

    python -m longclip.convert ViT-B-16.pt checkpoints/base --stretch

Files are recognised by what is in them, not by their name.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from longclip.checkpoint import MANIFEST, Checkpoint, load_checkpoint, load_transform, save_checkpoint
from longclip.command_line import run_command
from longclip.errors import CheckpointError, ConfigError
from longclip.files import file_sha256
from longclip.images import ImageTransform
from longclip.stretch import KEPT_POSITIONS, STRETCH_FACTOR, replace_positions, stretch_positions, text_positions
from longclip.tokenizer import build_tokenizer
from longclip.weights import onnx, open_clip, sentence_transformers
from longclip.weights.side_configs import Companion, is_text_encoder, read_companion
from longclip.weights.state_dicts import (
    ACTIVATIONS,
    StateDict,
    bare_names,
    detect_layout,
    infer_config,
    require_names,
    to_huggingface,
)
from longclip.weights.tensor_files import read_tensors

ORIGINAL_POSITIONS = 77

_OPEN_CLIP_WEIGHTS = (open_clip.WEIGHTS, "open_clip_pytorch_model.bin")
_HUGGING_FACE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TORCH_WEIGHTS = "pytorch_model.bin"
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx")


@dataclass(frozen=True)
class Conversion:
    """A converted CLIP, and what was found out about its source."""

    checkpoint: Checkpoint
    source_format: str
    """`openai`, `long-clip`, `open_clip`, `huggingface`, `text-encoder`, `sentence-transformers` or `onnx`."""
    weights: Path | None
    """The file that the weights came from; None for a hub name or for weights in several files."""
    activation_assumed: bool
    """Whether nothing told the activation, so that OpenAI's was taken."""


def convert_checkpoint(
    source: str | Path, activation: str | None = None, image_tower: str | Path | None = None
) -> Checkpoint:
    """Load a CLIP from whatever holds one.

    Args:
        source: a weights file (OpenAI, TorchScript or not; official Long-CLIP; open_clip; Hugging Face; a text encoder
            alone), a directory of open_clip, Hugging Face, sentence-transformers or our ONNX export, or a hub name.
        activation: `quick_gelu` or `gelu`, for weights without a config that tells; `quick_gelu` where None.
        image_tower: for a text encoder alone, the CLIP that completes it: its image tower, its logit scale and, where
            the text encoder comes without one, its text projection. Any source as well.

    Returns:
        The CLIP in float32 and evaluation mode.

    Raises:
        CheckpointError: nothing is there, it is no CLIP, it is damaged, or reading it would run foreign Python code.
        ConfigError: `activation` is unknown or contradicts the source's config.
    """
    return read_source(source, activation, image_tower).checkpoint


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
    tokenizer = copy.copy(checkpoint.tokenizer)  # a deep copy would lose how it decodes
    tokenizer.model_max_length = table.shape[0]
    return Checkpoint(checkpoint.model, tokenizer, checkpoint.transform)


def read_source(source: str | Path, activation: str | None = None, image_tower: str | Path | None = None) -> Conversion:
    """Like `convert_checkpoint`, with what was found out on the way."""
    if activation not in (None, *ACTIVATIONS):
        raise ConfigError(f"activation '{activation}' is unknown; allowed are {', '.join(ACTIVATIONS)}")
    path = Path(source).expanduser()
    if (path / sentence_transformers.MODULES).is_file() and (module := _clip_module(path)) != path:
        return replace(read_source(module, activation, image_tower), source_format="sentence-transformers")
    weights = _find_weights(path) if path.is_dir() else path
    if weights is None or not (weights.exists() or path.suffix in _WEIGHT_SUFFIXES):
        if image_tower is not None:
            raise _second_image_tower(source)
        return _read_hugging_face(source, activation)
    if not weights.is_file():
        raise CheckpointError(f"weights '{source}': no such file")
    try:
        return _read_weights(weights, activation, image_tower)
    except CheckpointError as error:
        raise CheckpointError(f"weights '{weights}': {error}") from error


def _clip_module(directory: Path) -> Path:
    """Where a sentence-transformers directory has its CLIP, which may be that directory itself."""
    path = directory / sentence_transformers.MODULES
    try:
        modules = [
            (module["type"].rpartition(".")[2], Path(module["path"])) for module in json.loads(path.read_text("utf-8"))
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make sense of '{path}': {error!r}") from error
    others = [kind for kind, _ in modules[1:] if kind != "Normalize"]
    if not modules or others:
        what = f"{others[0]} behind its first module" if others else "no module"
        raise CheckpointError(f"sentence-transformers model '{directory}' has {what}: it is more or less than a CLIP")
    module = modules[0][1]
    if module.is_absolute() or ".." in module.parts:
        raise CheckpointError(f"sentence-transformers model '{directory}' has its first module elsewhere: '{module}'")
    return directory / module


def _second_image_tower(source: str | Path) -> ConfigError:
    return ConfigError(f"'{source}' is a whole CLIP; --image-tower only completes a text encoder, leave it out")


def _find_weights(directory: Path) -> Path | None:
    """The one weights file of a directory that is no complete Hugging Face one; None for one that is."""
    complete = (directory / "config.json").is_file()
    if complete and any((directory / name).is_file() for name in _HUGGING_FACE_WEIGHTS):
        alone = directory / _HUGGING_FACE_WEIGHTS[0]
        return alone if alone.is_file() and is_text_encoder(directory) else None
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
    found = "onnx" if (path / onnx.TEXT_GRAPH).is_file() else "huggingface"
    return Conversion(checkpoint, found, weights if weights.is_file() else None, False)


def _read_weights(weights: Path, activation: str | None, image_tower: str | Path | None) -> Conversion:
    state: StateDict = bare_names(read_tensors(weights))
    layout = detect_layout(state)
    companion = read_companion(weights.parent, layout)
    if layout == "text-encoder":
        if image_tower is None:
            raise CheckpointError(
                "it is a text encoder alone; name the CLIP whose image tower belongs to it with --image-tower"
            )
        companion, state = _complete(companion, state, read_source(image_tower).checkpoint)
    elif image_tower is not None:
        raise _second_image_tower(weights)
    chosen, assumed = _choose_activation(activation, companion.hints.activation)
    converted = to_huggingface(state)
    model = _build_model(converted, infer_config(converted, chosen, companion.hints))
    config = model.config
    if layout == "huggingface":
        transform = load_transform(weights.parent, config)
    else:
        transform = ImageTransform(config.vision_config.image_size, companion.mean, companion.std)
    checkpoint = Checkpoint(model, build_tokenizer(config.text_config.max_position_embeddings), transform)
    return Conversion(checkpoint, companion.source_format or layout, weights, assumed)


def _complete(companion: Companion, text: StateDict, base: Checkpoint) -> tuple[Companion, StateDict]:
    """A text encoder's weights and what is known of them, completed by those of a CLIP."""
    known, config = base.model.state_dict(), base.model.config
    activation = config.vision_config.hidden_act
    if companion.hints.activation not in (None, activation):
        raise CheckpointError(
            f"it has the activation {companion.hints.activation}, the CLIP of --image-tower {activation}: they do not"
            " belong together"
        )
    state = {name: tensor for name, tensor in known.items() if not name.startswith("text_model.")} | dict(text)
    hints = replace(
        companion.hints,
        activation=activation,
        image_size=config.vision_config.image_size,
        vision_heads=config.vision_config.num_attention_heads,
    )
    norm = "text_model.final_layer_norm.weight"
    if norm in text and text[norm].shape == known[norm].shape:  # no shape tells the heads
        hints = replace(hints, text_heads=hints.text_heads or config.text_config.num_attention_heads)
    return Companion("text-encoder", hints, base.transform.mean, base.transform.std), state


def _choose_activation(requested: str | None, known: str | None) -> tuple[str, bool]:
    """The activation, and whether it had to be assumed."""
    if requested and known and requested != known:
        raise ConfigError(f"activation '{requested}' contradicts the source's config, which has '{known}'")
    return requested or known or ACTIVATIONS[0], not (requested or known)


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
    conversion = read_source(options.source, options.activation, options.image_tower)
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
  sentence-transformers, ONNX   the directories that `python -m longclip.export` writes
  a text encoder alone          of ComfyUI or diffusers; --image-tower names the CLIP that completes it

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
    parser.add_argument(
        "--image-tower",
        metavar="CLIP",
        help="of a text encoder alone: the CLIP that it takes all but its text tower from",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    return parser


if __name__ == "__main__":
    sys.exit(main())
