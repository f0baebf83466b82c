"""Convert CLIP weights of any common format to a Hugging Face directory, and stretch them to 248 tokens.

    python -m longclip.convert ViT-B-16.pt checkpoints/base --stretch

Files are recognised by their content, not by their name.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longclip.command_line import run_command
from longclip.constants import (
    ACTIVATIONS,
    CLIP_CONTEXT_LENGTH,
    KEPT_POSITIONS,
    LONG_CLIP_CONTEXT_LENGTH,
    STRETCH_FACTOR,
)
from longclip.errors import ConfigError
from longclip.files import MANIFEST, file_sha256


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> str:
    from longclip.checkpoint import save_checkpoint
    from longclip.stretch import stretch_checkpoint
    from longclip.weights.reading import read_source

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
    """Refuse a destination whose replacement would destroy something, before any work is done."""
    if not target.exists():
        return
    if not overwrite:
        raise ConfigError(f"destination '{target}' exists; choose another one, or replace it with --overwrite")
    if not (target / MANIFEST).is_file():
        raise ConfigError(
            f"destination '{target}' is not a checkpoint of this library (it has no {MANIFEST}) and is not overwritten"
        )
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

exit status: 0 success, 2 wrong option or destination, 4 unusable source, 1 any other error.
Reading weights never runs code in them, neither pickled nor TorchScript.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="weights file, directory or hub name")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument(
        "--stretch",
        action="store_true",
        help=f"stretch the text positions: {CLIP_CONTEXT_LENGTH} become {LONG_CLIP_CONTEXT_LENGTH}",
    )
    parser.add_argument(
        "--kept-positions",
        type=int,
        default=KEPT_POSITIONS,
        metavar="N",
        help="first positions to keep unchanged (default %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--stretch-factor",
        type=int,
        default=STRETCH_FACTOR,
        metavar="N",
        help="positions made from each of the others (default %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="activation of weights without a config that says it: quick_gelu for OpenAI and Long-CLIP (default), gelu"
        " for most models of open_clip",
    )
    parser.add_argument(
        "--image-tower",
        metavar="CLIP",
        help="for a text encoder alone: the CLIP that provides everything but the text tower",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    return parser


if __name__ == "__main__":
    sys.exit(main())
