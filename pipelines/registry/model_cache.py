"""Local copies of models: registered versions are downloaded, files of weights are converted."""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from longclip.checkpoint import PROCESSOR, load_checkpoint, save_checkpoint, verify_checkpoint
from longclip.files import MANIFEST, file_sha256
from longclip.model_uri import is_model_uri
from longclip.weights import hugging_face, open_clip
from longclip.weights.reading import read_source
from pipelines.common.events import warn
from pipelines.registry.versions import download_checkpoint, resolve_version

SIDE_FILES = (hugging_face.CONFIG, open_clip.CONFIG, PROCESSOR)
CONVERSION = 1
"""To be increased when the same source is converted to another checkpoint."""
MODEL_SUFFIXES = (".safetensors", ".json", ".txt")
"""Files that `load_checkpoint` may read: weights, configs, and the vocabulary of a tokenizer."""


def local_model(source: str, cache: Path, tracking_uri: str, activation: str | None = None) -> str:
    """A directory or hub name that `load_checkpoint` accepts, for any way of naming a model.

    Args:
        source: directory, hub name, `models:/name/version`, `models:/name@alias`, or a weights file that
            `longclip.convert_checkpoint` reads.
        cache: directory for downloaded and converted models; on a cluster, one that all nodes see.
        tracking_uri: registry of `models:/`.
        activation: `quick_gelu` or `gelu`, of a weights file without a config next to it; None assumes the former and
            warns.

    Raises:
        CheckpointError: the model does not exist or is not a CLIP model.
        ConfigError: the config of the weights contradicts `activation`.
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
    return str(_converted(path, cache, activation)) if path.is_file() else source


def assumed_activation(model: str) -> str | None:
    """The activation of a model from `local_model` if nothing said it when the model was converted."""
    manifest = Path(model) / MANIFEST
    metadata = json.loads(manifest.read_text())["metadata"] if manifest.is_file() else {}
    return metadata.get("assumed_activation")


def model_digest(model: str) -> str:
    """Hex sha256 of what a model from `local_model` computes: its weights, configs and tokenizer, not its name.

    Raises:
        CheckpointError: it cannot be read.
    """
    directory = Path(model)
    if not directory.is_dir():
        load_checkpoint(model)  # now its files are in the cache of the hub, or the error says what is wrong
        directory = Path(str(cached_file(model, "config.json"))).parent
    files = [path for path in sorted(directory.iterdir()) if path.name.endswith(MODEL_SUFFIXES) and path.is_file()]
    content = [[path.name, file_sha256(path)] for path in files if path.name != MANIFEST]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _converted(weights: Path, cache: Path, activation: str | None) -> Path:
    # The result also depends on the config files next to the weights.
    files = [weights, *(file for name in SIDE_FILES if (file := weights.parent / name).is_file())]
    content = [[file.name, file_sha256(file)] for file in files[1:]]
    key = hashlib.sha256(json.dumps([CONVERSION, activation, file_sha256(weights), content]).encode()).hexdigest()[:16]
    directory = cache / "converted" / key
    if directory.is_dir():
        verify_checkpoint(directory)
    else:
        conversion = read_source(weights, activation)
        chosen = conversion.checkpoint.model.config.text_config.hidden_act
        assumed = chosen if conversion.activation_assumed else None
        save_checkpoint(conversion.checkpoint, directory, {"origin": str(weights), "assumed_activation": assumed})
    if assumed := assumed_activation(str(directory)):
        warn(f"'{weights}' does not say its activation; {assumed} is assumed, see the setting for activations")
    return directory
