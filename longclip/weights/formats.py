"""Formats in which other software reads a CLIP; `longclip.convert` reads all of them back.

The formats can be listed without loading torch: a format's own module is imported when it is written.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longclip.checkpoint import Checkpoint


@dataclass(frozen=True)
class Format:
    """A format that a CLIP can be written in."""

    module: str
    """Module of `longclip.weights` that writes it."""
    content: str
    """What is written, for the help."""
    is_directory: bool

    def write(self, checkpoint: "Checkpoint", path: Path) -> str:
        """Write to a new file, or into an empty directory.

        Returns:
            How to use the result, with `{path}` for its path.

        Raises:
            CheckpointError: the format cannot hold this model.
        """
        return import_module(f"longclip.weights.{self.module}").write(checkpoint, path)


FORMATS = {
    "openai": Format("openai", "state dict (.pt) for the code of openai/CLIP; 77 positions only", False),
    "long-clip": Format("long_clip", "state dict (.pt) for the official Long-CLIP code; 248 positions only", False),
    "open_clip": Format("open_clip", "directory for open_clip: config and safetensors", True),
    "text-encoder": Format("text_encoder", "text tower alone (.safetensors) for ComfyUI and the web UIs", False),
    "onnx": Format("onnx", "directory of ONNX graphs of both towers, dynamic in batch and length", True),
    "sentence-transformers": Format("sentence_transformers", "directory for sentence-transformers", True),
}
