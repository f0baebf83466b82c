"""Files that appear whole or not at all, and their checksums."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def publish_directory(aside: Path, directory: Path) -> None:
    """Give the finished directory `aside` its final name, replacing what had it."""
    os.chmod(aside, 0o755)
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
