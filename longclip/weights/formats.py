"""Formats that other software reads a CLIP from, one room each. What they hold is read by `longclip.convert`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longclip.checkpoint import Checkpoint
from longclip.weights.onnx import write_onnx
from longclip.weights.open_clip import write_open_clip
from longclip.weights.openai import write_long_clip, write_openai
from longclip.weights.sentence_transformers import write_sentence_transformers
from longclip.weights.text_encoder import write_text_encoder


@dataclass(frozen=True)
class Format:
    """How a CLIP is written for other software."""

    content: str
    """What comes out, for the help."""
    is_directory: bool
    write: Callable[[Checkpoint, Path], str]
    """Writes to a new file, or into an empty directory; returns how the result is used, with `{path}` for its place.
    Raises a `CheckpointError` for what the format cannot hold."""


FORMATS = {
    "openai": Format("state dict (.pt) for the code of openai/CLIP; 77 positions only", False, write_openai),
    "long-clip": Format("state dict (.pt) for the official Long-CLIP code; 248 positions only", False, write_long_clip),
    "open_clip": Format("directory for open_clip: config and safetensors", True, write_open_clip),
    "text-encoder": Format("text tower alone (.safetensors) for ComfyUI and the web UIs", False, write_text_encoder),
    "onnx": Format("directory of ONNX graphs of both towers, dynamic in batch and length", True, write_onnx),
    "sentence-transformers": Format("directory for sentence-transformers", True, write_sentence_transformers),
}
