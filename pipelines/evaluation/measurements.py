"""Finished measurements of a benchmark: one file per task and model, used again as long as what it depends on is equal.

A measurement depends on the content of the model, on the settings, the protocol and the data of the task, and on what
is measured. All of this is its key, which is stored with it.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError
from upath import UPath

from longclip.files import file_sha256
from pipelines.common.events import report, warn
from pipelines.common.file_listing import file_versions
from pipelines.common.settings import dump
from pipelines.common.storage import Storage, existing_path, explained
from pipelines.data.sources.parquet import ParquetSource
from pipelines.data.sources.source import Source
from pipelines.data.sources.suffixes import IMAGE_SUFFIXES
from pipelines.evaluation.measured import Measured
from pipelines.evaluation.packing import load_packed, read_header, save_packed
from pipelines.evaluation.settings import TaskSettings
from pipelines.evaluation.tasks import Task, templates_of

METHOD = 1
"""To be increased when the same model, settings and data give another measurement."""

SUFFIX = ".safetensors"


class Measurements:
    """The files of finished measurements, `TASK/MODEL.safetensors` in a folder."""

    def __init__(self, folder: Path, max_rejected_fraction: float) -> None:
        self.folder, self.max_rejected_fraction = folder, max_rejected_fraction

    def path(self, task: str, model: str) -> Path:
        """File of a measurement."""
        return self.folder / task / f"{model}{SUFFIX}"

    def others(self, tasks: Collection[str], models: Collection[str]) -> list[Path]:
        """Files of other tasks and models."""
        wanted = {self.path(task, model) for task in tasks for model in models}
        return sorted(set(self.folder.glob(f"*/*{SUFFIX}")) - wanted)

    def write(self, measured: Measured, key: Mapping[str, Any], path: Path) -> None:
        """Write a measurement to a path, which the caller moves to that of `path()`."""
        header = {"key": json.dumps(key, sort_keys=True), "max_rejected_fraction": str(self.max_rejected_fraction)}
        save_packed(measured, path, header)

    def read(self, task: str, model: str, key: Mapping[str, Any]) -> Measured | None:
        """A finished measurement with this key; None if there is none, after saying why a present one is not used."""
        path = self.path(task, model)
        if not path.is_file():
            return None
        try:
            header = read_header(path)
            before = json.loads(header["key"])
            changed = [name for name in sorted(before | dict(key)) if before.get(name) != key.get(name)]
            measured = None if changed else load_packed(Measured, path)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            warn(f"{path} cannot be read ({type(error).__name__}); {task} is measured again with {model}")
            return None
        # Rejected rows only decide whether the measurement fails, so another limit changes nothing without them.
        if measured and measured.rejected and self.max_rejected_fraction < float(header["max_rejected_fraction"]):
            changed = ["max_rejected_fraction"]
        if changed:
            report(f"{task} is measured again with {model}: changed since then: {', '.join(changed)}")
            return None
        return measured


def measurement_key(
    model: str, task: Task, data: str, settings: TaskSettings, measured_also: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a measurement depends on, as JSON.

    Args:
        model: digest of the model, from `pipelines.registry.model_cache.model_digest`.
        task: the opened task.
        data: digest of its data, from `data_digest`.
        settings: of the task.
        measured_also: settings of what is measured.
    """
    words: list[Any] = [templates_of(task)] if task.is_zero_shot else []
    words += [file_sha256(task.class_file)] if task.class_file else []
    key = {
        "method": METHOD,
        "model": model,
        "settings": dump(settings),
        "protocol": dump(task.protocol),
        "classes and templates": words,
        "data": data,
        **measured_also,
    }
    return json.loads(json.dumps(key))


def data_digest(field: str, value: str, source: Source, storage: Storage, output: Path) -> str:
    """Hex sha256 of the names, sizes and ETags or modification times of the files of a source.

    These are the files at or below its path and, if rows name their images by path and these are elsewhere, the images
    there. Images that rows name by URI are not looked at, nor paths that a Parquet stores as bytes.

    Args:
        field: setting that names the source.
        value: its path.
        source: the opened source.
        storage: access to object storage.
        output: directory of the benchmark, which may be below the data.
    """
    root = existing_path(field, value, storage)
    versions = _versions(field, root, output)
    images = _image_root(source)
    if images is not None and not f"{images.path}/".startswith(f"{root.path.rstrip('/')}/"):
        versions += [line for line in _versions(field, images, output) if line[0].lower().endswith(IMAGE_SUFFIXES)]
    return hashlib.sha256(json.dumps(versions).encode()).hexdigest()


def _image_root(source: Source) -> UPath | None:
    """Directory of the images of a source whose rows name them."""
    if isinstance(source, ParquetSource):
        kind = source.data.schema.field(source.image).type
        return None if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else source.references.root
    return getattr(source, "images", None)


def _versions(field: str, root: UPath, output: Path) -> list[list[str]]:
    with explained(field, root):
        return [
            [path, str(info.get("size")), str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))]
            for path, info in (file_versions(root) if root.exists() else [])
            if not path.startswith(f"{output}/")
        ]
