"""Files that appear whole or not at all, and their checksums."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "longclip.json"
"""File of a checkpoint directory that records its origin and the checksums of its other files."""

_READABLE = 0o644  # safetensors writes files that only their owner can read


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """Context manager that writes a directory to a temporary path and renames it if the block succeeds.

    Yields the temporary path. The rename replaces an existing directory.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield aside
        publish_directory(aside, directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Context manager that writes a file to a temporary path and renames it if the block succeeds.

    Yields the temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        aside = Path(directory, path.name)
        yield aside
        os.chmod(aside, _READABLE)
        os.replace(aside, path)


def publish_directory(aside: Path, directory: Path) -> None:
    """Rename the finished directory `aside` to its final name, replacing an existing one."""
    os.chmod(aside, 0o755)
    for file in aside.rglob("*"):
        if file.is_file():
            os.chmod(file, _READABLE)
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        os.rename(directory, old / "replaced")
        os.rename(aside, directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(aside, directory)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
