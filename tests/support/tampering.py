"""Ways to change a checkpoint that somebody registered, and what is said of each."""

import shutil
from collections.abc import Callable
from pathlib import Path

from longclip.checkpoint import MANIFEST
from longclip.files import file_sha256


def change_weights(checkpoint: Path) -> None:
    """Change a bit of the weights."""
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def change_weights_and_manifest(checkpoint: Path) -> None:
    """Change the weights, and the manifest so that it agrees: only who kept the manifest's checksum can tell."""
    before = file_sha256(checkpoint / "model.safetensors")
    change_weights(checkpoint)
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text.replace(before, file_sha256(checkpoint / "model.safetensors")))


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "the content of 'model.safetensors' was changed": change_weights,
    "its longclip.json was changed": change_weights_and_manifest,
    "'pytorch_model.bin' is not in its manifest": lambda path: (path / "pytorch_model.bin").write_bytes(b"\x80"),
    "'config.json' is missing": lambda path: (path / "config.json").unlink(),
    "it has no longclip.json": lambda path: (path / MANIFEST).unlink(),
    "'more' is a link or a directory": lambda path: shutil.copytree(path, path / "more"),
}
"""What `verify_checkpoint` says, and what was done to the checkpoint's directory."""
