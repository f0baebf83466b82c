"""Downloads of this node: each is downloaded once, whole or not at all, however many replicas need it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(directory: Path, download: Callable[[Path], Path]) -> Path:
    """Return a directory of the cache, downloading it first if it does not exist.

    Args:
        directory: path of the result; must be different for different content.
        download: fills the temporary directory that it is given, and returns the path in it to keep. Its exceptions are
            raised here, unless another process has created `directory` in the meantime.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        os.rename(download(temporary), directory)
    except Exception:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
