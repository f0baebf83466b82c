"""What was downloaded to this node: each thing once, whole or not at all, however many replicas want it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(directory: Path, download: Callable[[Path], Path]) -> Path:
    """A directory of the cache, made where it is not there.

    Args:
        directory: what it is called; its name must change with what it holds.
        download: fills a directory that it is given, and says which part of it is wanted; what it raises is raised here
            unless another replica has made the directory meanwhile.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        os.rename(download(aside), directory)
    except Exception:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory
