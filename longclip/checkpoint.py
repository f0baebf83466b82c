"""Checkpoints: plain Hugging Face CLIP directories, written whole or not at all.

`model.safetensors`, `config.json`, tokenizer and image processor make a directory that `transformers` loads without
this library. `longclip.json` records the model's origin and the sha256 of every other file.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import cached_file, logging

from longclip.errors import CheckpointError, one_line
from longclip.files import MANIFEST, file_sha256, whole_directory
from longclip.images import ImageTransform
from longclip.tokenizer import build_tokenizer, load_tokenizer

MANIFEST_VERSION = 1
PROCESSOR = "preprocessor_config.json"

SIGLIP_REASON = (
    "a SigLIP model is not a CLIP model: its text tower attends in both directions and is read at the last of a fixed"
    " number of padded positions, not at the end token, so more positions change the meaning of every text"
)


@dataclass(frozen=True)
class Checkpoint:
    """A CLIP with its tokenizer and image transform."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    transform: ImageTransform

    @property
    def context_length(self) -> int:
        """Tokens the model reads: 77 for plain CLIP, 248 for Long-CLIP."""
        return self.model.config.text_config.max_position_embeddings


def new_model(config: CLIPConfig) -> Checkpoint:
    """An untrained CLIP with the real CLIP vocabulary, initialised from torch's global random state."""
    transform = ImageTransform(config.vision_config.image_size)
    tokenizer = build_tokenizer(config.text_config.max_position_embeddings)
    return Checkpoint(CLIPModel(config), tokenizer, transform)


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Load a CLIP from a Hugging Face directory, or by its hub name if there is a network.

    Only safetensors and JSON are read. The model is returned in float32 and evaluation mode. A source without a
    tokenizer has CLIP's own if its vocabulary has that size.

    Raises:
        CheckpointError: there is nothing, it is not a CLIP, its files are incomplete or damaged, its weights are not
            exactly those of its config, or its tokenizer or image processor does not fit.
    """
    source = str(source)
    path = Path(source)
    looks_like_path = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_like_path and not path.is_dir():
        kind = "is a file, not a directory" if path.is_file() else "does not exist"
        raise CheckpointError(
            f"checkpoint '{source}' {kind}; give a Hugging Face CLIP directory, or convert other weights with"
            " `python -m longclip.convert`"
        )
    _require_file(path, source, "config.json")
    _read(source, "config.json", _require_clip)
    _require_file(path, source, "model.safetensors*")  # weights in several files have an index of that name
    model = _read(source, "weights", _load_model)
    text = model.config.text_config
    tokenizer = _read(source, "tokenizer", lambda name: load_tokenizer(name, text.max_position_embeddings))
    if len(tokenizer) != text.vocab_size:
        raise CheckpointError(
            f"checkpoint '{source}': its tokenizer has {len(tokenizer)} tokens, its embedding has {text.vocab_size};"
            " add the tokenizer files that belong to these weights"
        )
    return Checkpoint(model, tokenizer, _read(source, PROCESSOR, lambda name: load_transform(name, model.config)))


def _require_file(path: Path, source: str, pattern: str) -> None:
    if path.is_dir() and not any(path.glob(pattern)):
        raise CheckpointError(
            f"checkpoint '{source}' has no {pattern.rstrip('*')}; convert open_clip directories and other weights with"
            f" `python -m longclip.convert {source} <new directory>`"
        )


def _load_model(source: str) -> CLIPModel:
    # transformers draws missing weights at random and drops unknown ones, and reports both in its log only. The log is
    # switched off meanwhile, because these are errors here.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, loaded = CLIPModel.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    unknown = {name for name in loaded["unexpected_keys"] if not name.endswith(".position_ids")}
    for names, problem in (
        (loaded["missing_keys"], "are missing"),
        (unknown, "are not part of a CLIP"),
        ({name for name, *_ in loaded["mismatched_keys"]}, "do not have the shape that config.json requires"),
    ):
        if names:
            raise CheckpointError(f"{len(names)} weights {problem}: {some(sorted(names))}")
    model = model.float().eval()
    require_finite(model.state_dict())
    return model


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Raise a `CheckpointError` that names up to three weights with NaN or infinite values, if there are any."""
    wrong = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise CheckpointError(f"{len(wrong)} weights have NaN or infinite values: {some(wrong)}")


def some(names: Iterable[str]) -> str:
    """The first three names, for an error message."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(source: str, part: str, read: Any) -> Any:
    try:
        return read(source)
    except CheckpointError as error:
        prefix = f"checkpoint '{source}'"
        raise error if str(error).startswith(prefix) else CheckpointError(f"{prefix}: {error}") from error
    except Exception as error:  # transformers, safetensors and the hub client share no base class
        reason = one_line(error)
        raise CheckpointError(f"checkpoint '{source}': cannot read its {part}: {reason}") from error


def _require_clip(source: str) -> None:
    config = AutoConfig.from_pretrained(source)
    if config.model_type.startswith("siglip"):
        raise CheckpointError(f"checkpoint '{source}': {SIGLIP_REASON}")
    if config.model_type != "clip":
        raise CheckpointError(
            f"checkpoint '{source}' is a '{config.model_type}' model, not a CLIP (model_type 'clip');"
            " Long-CLIP needs a CLIP with learned text positions"
        )


def load_transform(source: str | Path, config: CLIPConfig) -> ImageTransform:
    """The image transform of a Hugging Face directory or hub name; CLIP's if it has no image processor.

    Raises:
        CheckpointError: it does something that the transform cannot do.
    """
    size = config.vision_config.image_size
    for name, part in (("processor_config.json", "image_processor"), (PROCESSOR, None)):
        # None where the repository has no such file; a network that fails is an error.
        file = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        saved = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        if saved := saved.get(part) if part else saved:
            return ImageTransform.from_processor_config(saved, size)
    return ImageTransform(size)


def save_checkpoint(
    checkpoint: Checkpoint,
    directory: str | Path,
    metadata: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint to a temporary directory and publish it with one rename.

    Args:
        checkpoint: what to write.
        directory: final path; an earlier checkpoint is replaced.
        metadata: JSON-serialisable facts about the origin, kept in the manifest.
        weights: state dict to write instead of the model's, e.g. a moving average.
    """
    with whole_directory(directory) as temporary:
        write_checkpoint_files(checkpoint, temporary, metadata, weights)


def write_checkpoint_files(
    checkpoint: Checkpoint, directory: Path, metadata: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the files of a checkpoint into an empty directory, which the caller publishes."""
    config = checkpoint.model.config
    # Read by the classes of one tower, such as CLIPTextModelWithProjection, which do not see the whole config.
    config.text_config.projection_dim = config.vision_config.projection_dim = config.projection_dim
    # A copy, because transformers empties the dict.
    checkpoint.model.save_pretrained(directory, state_dict=dict(weights) if weights is not None else None)
    checkpoint.tokenizer.model_max_length = checkpoint.context_length
    checkpoint.tokenizer.save_pretrained(directory)
    processor = json.dumps(checkpoint.transform.processor_config(), indent=2)
    (directory / PROCESSOR).write_text(processor + "\n")
    hashes = {file.name: file_sha256(file) for file in sorted(directory.iterdir())}
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "checkpoint_id": _checkpoint_id(directory, hashes),
        "context_length": checkpoint.context_length,
        "embedding_dim": config.projection_dim,
        "metadata": dict(metadata),
        "sha256": hashes,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def verify_checkpoint(directory: str | Path, manifest_sha256: str | None = None) -> None:
    """Check that a checkpoint directory holds what was written, and nothing else.

    Args:
        directory: a directory that `save_checkpoint` wrote, or a copy of it.
        manifest_sha256: expected checksum of the manifest, from a trusted source; None skips this check.

    Raises:
        CheckpointError: a file was changed, added, removed or made a link, or there is no manifest.
    """
    directory = Path(directory)
    problem = _first_difference(directory, manifest_sha256)
    if problem:
        raise CheckpointError(f"checkpoint '{directory}' is not what was written: {problem}; write it again")


def _first_difference(directory: Path, manifest_sha256: str | None) -> str | None:
    entries = {entry.name: entry for entry in directory.iterdir()}
    wrong = next((name for name, entry in entries.items() if entry.is_symlink() or not entry.is_file()), None)
    if wrong is not None:
        return f"'{wrong}' is a link or a directory"
    if MANIFEST not in entries:
        return f"it has no {MANIFEST}"
    if manifest_sha256 not in (None, file_sha256(entries[MANIFEST])):
        return f"its {MANIFEST} was changed"
    try:
        expected = json.loads(entries.pop(MANIFEST).read_bytes())["sha256"]
        changed = sorted(expected.keys() ^ entries.keys())
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if changed:
        return f"'{changed[0]}' is {'missing' if changed[0] in expected else 'not in its manifest'}"
    wrong = next((name for name, entry in entries.items() if file_sha256(entry) != expected[name]), None)
    return f"the content of '{wrong}' was changed" if wrong else None


def checkpoint_id(directory: str | Path) -> str:
    """Identifies what a checkpoint computes: 16 hex digits of a sha256 over its weights, config, tokenizer and image
    processor.

    Raises:
        OSError: a file cannot be read.
    """
    directory = Path(directory)
    files = [directory / name for name in (*_weight_files(directory), "tokenizer.json", PROCESSOR)]
    return _checkpoint_id(directory, {file.name: file_sha256(file) for file in files if file.is_file()})


def _checkpoint_id(directory: Path, hashes: Mapping[str, str]) -> str:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")}
    values = [hashes.get(name) for name in (*_weight_files(directory), "tokenizer.json", PROCESSOR)]
    return hashlib.sha256(json.dumps([config, values], sort_keys=True).encode()).hexdigest()[:16]


def _weight_files(directory: Path) -> list[str]:
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    return sorted(file.name for file in directory.glob("model-*.safetensors")) or ["model.safetensors"]


def checkpoint_directory(source: str | Path) -> Path:
    """Local directory with the files of a source of `load_checkpoint`: the directory, or that of a hub name's files."""
    if Path(source).is_dir():
        return Path(source)
    return Path(cached_file(str(source), "config.json")).parent
