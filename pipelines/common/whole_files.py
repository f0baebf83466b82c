"""Files that are written completely or not at all, on any storage."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from longclip import files
from pipelines.common.storage import is_local


@contextmanager
def whole_file(path: UPath) -> Iterator[Path]:
    """Give the block a local path to write to; if it succeeds, the file is moved or uploaded to `path`."""
    if is_local(path):
        with files.whole_file(path.path) as local_path:
            yield local_path
    else:
        with tempfile.TemporaryDirectory() as directory:
            local_path = Path(directory, path.name)
            yield local_path
            path.fs.put_file(str(local_path), path.path)


def write_whole(path: UPath, content: bytes) -> None:
    """Write `content` to a file, completely or not at all."""
    with whole_file(path) as local_path:
        local_path.write_bytes(content)


def make_directory(path: UPath) -> None:
    """Create a directory on a local disk; object storage needs none."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: UPath) -> None:
    """Remove a file, or a directory with its content, if it exists."""
    if is_local(path) and path.is_dir():
        shutil.rmtree(path.path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)
