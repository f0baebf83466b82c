"""Which reader a source needs."""

import json

from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines.common.parquet_set import open_parquet
from pipelines.common.storage import Storage, existing_path, explained, open_path
from pipelines.data.sources.cifar import CifarSource
from pipelines.data.sources.listings import LISTINGS, ListingSource
from pipelines.data.sources.parquet import parquet_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Source
from pipelines.data.sources.tar import IMAGE_SUFFIXES, TAR_SUFFIXES, TarSource

PEEK_BYTES = 64 * 1024


def open_source(field: str, value: str, settings: SourceSettings, storage: Storage) -> Source:
    """The source that a setting names.

    Args:
        field: setting that `value` came from, for messages.
        value: file, directory or URI.
        settings: its format, or `auto`, and names of columns.
        storage: how object storage is reached.

    Raises:
        DataError: nothing is there, or it is nothing that can be read.
    """
    path = existing_path(field, value, storage)
    with explained(field, value):
        kind = settings.format if settings.format != "auto" else _detect(field, path)
        images = open_path("source.images", settings.images, storage) if settings.images else _images_root(path, kind)
        unknown = [name for name in ("split", "first_rows") if getattr(settings, name) is not None]
        if kind not in LISTINGS and unknown:
            raise ConfigError(f"source.{unknown[0]} is not for {kind}; it is for {', '.join(LISTINGS)}")
        if kind == "cifar":
            return CifarSource(field, path)
        if kind == "parquet":
            return parquet_source(field, open_parquet(field, value, storage, []), settings, storage, images)
        if kind == "webdataset":
            return TarSource(field, path, settings, storage)
        return ListingSource(field, path, kind, settings, storage, images)


def _images_root(path: UPath, kind: str) -> UPath:
    if kind == "urban1k":
        return path / "image"
    if kind == "dci":
        return path / "photos"
    folder = path if path.is_dir() else path.parent
    return folder / "images" if (folder / "images").is_dir() else folder


def _detect(field: str, path: UPath) -> str:
    names = [path.name] if path.is_file() else [name.rpartition("/")[2] for name in _some_names(path)]
    if any(name.endswith(TAR_SUFFIXES) for name in names):
        return "webdataset"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if path.is_dir():
        if (path / "image").is_dir() and (path / "caption").is_dir():
            return "urban1k"
        if (path / "annotations").is_dir() and (path / "photos").is_dir():
            return "dci"
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            return "folder"
    elif path.name.endswith((".token", ".token.txt")):
        return "flickr30k"
    elif path.name.endswith((".json", ".jsonl", ".jsonlines", ".ndjson")):
        kind = _detect_json(path)
        if kind:
            return kind
    formats = ", ".join(("parquet", "webdataset", "cifar", *LISTINGS))
    raise DataError(
        f"{field}='{path}' has no layout that can be told by its files; name it with --set source.format=, one of"
        f" {formats}"
    )


def _some_names(path: UPath) -> list[str]:
    """Files of a directory and, where it holds only directories, of the first of these."""
    entries = path.fs.ls(path.path, detail=True)
    files = [entry["name"] for entry in entries if entry["type"] == "file"]
    folders = sorted(entry["name"] for entry in entries if entry["type"] == "directory")
    if not files and folders:
        files = [entry["name"] for entry in path.fs.ls(folders[0], detail=True) if entry["type"] == "file"]
    return files


def _detect_json(path: UPath) -> str | None:
    with path.open("rb") as file:
        head = file.read(PEEK_BYTES).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if not path.name.endswith(".json"):
        try:
            first = json.loads(head.splitlines()[0])
        except (ValueError, IndexError):
            return "jsonl"
        keys = set(first) if isinstance(first, dict) else set()
        return "iiw" if "IIW" in keys else "docci" if {"image_file", "description"} <= keys else "jsonl"
    if head.startswith("["):
        return "sharegpt4v"
    return "coco" if '"images"' in head or '"annotations"' in head else None
