"""Detection of a source's layout by its files."""

import json

from upath import UPath

from longclip.errors import DataError
from pipelines.data.sources.listing_layouts import LAYOUTS
from pipelines.data.sources.tar import IMAGE_SUFFIXES, TAR_SUFFIXES

PEEK_BYTES = 64 * 1024


def detect_format(field: str, path: UPath) -> str:
    """The value of `source.format` that fits a file or directory.

    Args:
        field: setting that names the path, for messages.
        path: an existing file or directory.

    Raises:
        DataError: none fits.
    """
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
    formats = ", ".join(("parquet", "webdataset", "cifar", *LAYOUTS))
    raise DataError(
        f"{field}='{path}' has an unknown layout; name it with --set source.format=<format>, one of {formats}"
    )


def _some_names(path: UPath) -> list[str]:
    """Names of the files in a directory or, if it has only subdirectories, in the first of them."""
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
