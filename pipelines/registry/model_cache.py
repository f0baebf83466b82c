"""Local copies of models: registered versions are downloaded, files of weights are converted."""

import hashlib
from pathlib import Path

from longclip.checkpoint import save_checkpoint, verify_checkpoint
from longclip.files import file_sha256
from longclip.model_uri import is_model_uri
from longclip.weights.reading import convert_checkpoint
from pipelines.registry.versions import download_checkpoint, resolve_version


def local_model(source: str, cache: Path, tracking_uri: str) -> str:
    """A directory or hub name that `load_checkpoint` accepts, for any way of naming a model.

    Args:
        source: directory, hub name, `models:/name/version`, `models:/name@alias`, or a weights file that
            `longclip.convert_checkpoint` reads.
        cache: directory for downloaded and converted models; on a cluster, one that all nodes see.
        tracking_uri: registry of `models:/`.

    Raises:
        CheckpointError: the model does not exist or is not a CLIP model.
    """
    if is_model_uri(source):
        version = resolve_version(tracking_uri, source)
        key = hashlib.sha256(f"{tracking_uri}\0{version.uri}\0{version.source}".encode()).hexdigest()[:16]
        directory = cache / "registered" / key
        if directory.is_dir():
            verify_checkpoint(directory)
        else:
            download_checkpoint(tracking_uri, version.uri, directory)
        return str(directory)
    path = Path(source).expanduser()
    if path.is_file():
        directory = cache / "converted" / file_sha256(path)[:16]
        if not directory.is_dir():
            save_checkpoint(convert_checkpoint(path), directory, {"origin": str(path)})
        return str(directory)
    return source
