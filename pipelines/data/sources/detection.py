"""Detection of a source's layout by its files."""

import json

from upath import UPath

from longclip.errors import DataError
from pipelines.common.file_listing import HIDDEN, HIDDEN_MEDIA, PARQUET_SUFFIXES, FileListing, list_files
from pipelines.data.sources.folder_layouts import SIDE_SUFFIXES
from pipelines.data.sources.listing_layouts import LAYOUTS
from pipelines.data.sources.settings import IMAGE_NAMES, first_known
from pipelines.data.sources.suffixes import (
    ANNOTATION_SUFFIXES,
    IMAGE_SUFFIXES,
    JSON_LINES_SUFFIXES,
    METADATA_NAMES,
    TAR_SUFFIXES,
)
from pipelines.data.sources.text_decoding import open_text

PEEK_CHARACTERS = 64 * 1024


def detect_format(field: str, path: UPath, encoding: str) -> str:
    """The value of `source.format` that fits a file or directory.

    Args:
        field: setting that names the path, for messages.
        path: an existing file or directory.
        encoding: of text files without a byte-order mark.

    Raises:
        DataError: none fits.
    """
    name = path.name.lower()
    kind, others = None, ""
    if path.is_dir():
        listing = list_files(path, HIDDEN_MEDIA)
        kind, others = _directory(field, path, listing), listing.others(())
    elif name.endswith(TAR_SUFFIXES):
        kind = "webdataset"
    elif name.endswith(PARQUET_SUFFIXES):
        kind = "parquet"
    elif name.endswith((".token", ".token.txt")):
        kind = "flickr30k"
    elif name.endswith((".csv", ".tsv")):
        kind = "csv"
    elif name.endswith((".json", *JSON_LINES_SUFFIXES)):
        kind = _json(field, path, encoding)
    if kind:
        return kind
    formats = ", ".join(("parquet", "webdataset", "cifar", *LAYOUTS))
    raise DataError(
        f"{field}='{path}' has an unknown layout{others}; name it with --set source.format=<format>, one of {formats}"
    )


def _directory(field: str, path: UPath, listing: FileListing) -> str | None:
    if (path / "image").is_dir() and (path / "caption").is_dir():
        return "urban1k"
    if (path / "annotations").is_dir() and (path / "photos").is_dir():
        return "dci"
    images = listing.having(IMAGE_SUFFIXES)
    kinds = {"webdataset": _visible(listing, TAR_SUFFIXES), "parquet": _visible(listing, PARQUET_SUFFIXES)}
    stems = {name.rpartition(".")[0] for name in listing.having(SIDE_SUFFIXES)}
    captioned = [name for name in images if name.rpartition(".")[0] in stems]
    # img2dataset's output `files`: Parquet files are the metadata of folders of the same name.
    folders = {name.rpartition("/")[0] for name in captioned}
    if any(name.rpartition(".")[0] in folders for name in kinds["parquet"]):
        return "folder"
    # The files that are nearest to the root decide; of two kinds at the same depth, the tars: img2dataset writes its
    # metadata next to them as Parquet.
    depths = {kind: min(name.count("/") for name in names) for kind, names in kinds.items() if names}
    if depths:
        return min(depths, key=lambda kind: depths[kind])
    if not images:
        return None
    if any(name.rpartition("/")[2].lower() in METADATA_NAMES for name in listing.names):
        return "imagefolder"
    annotations = [name for name in listing.having(ANNOTATION_SUFFIXES) if "/" not in name]
    if annotations and not captioned:
        raise DataError(
            f"{field}='{path}' has images without texts next to them; to read the annotations in '{annotations[0]}',"
            f" give that file: --set {field}={path / annotations[0]}"
        )
    return "folder"


def _visible(listing: FileListing, suffixes: tuple[str, ...]) -> list[str]:
    names = listing.having(suffixes)
    return [name for name in names if not any(part.startswith(HIDDEN) for part in name.split("/"))]


def _json(field: str, path: UPath, encoding: str) -> str | None:
    try:
        with open_text(path, encoding) as text:
            head = text.read(PEEK_CHARACTERS).lstrip()
    except (DataError, UnicodeError) as error:
        raise DataError(f"{field}='{path}' cannot be read: it {error}") from error
    if path.name.lower().endswith(".json") and head.startswith("["):
        return "sharegpt4v"
    try:
        first = json.loads(head.partition("\n")[0])
    except (ValueError, RecursionError):
        first = None
    keys = set(first) if isinstance(first, dict) else set()
    if path.name.lower().endswith(".json"):
        if not keys:
            return "coco" if '"images"' in head or '"annotations"' in head else None
        if "annotations" in keys or _are_objects(first["images"] if "images" in keys else None):
            return "coco"
        # Lines of objects are often called `.json`.
        return "jsonl" if first_known(None, IMAGE_NAMES, keys) else None
    return "iiw" if "IIW" in keys else "docci" if {"image_file", "description"} <= keys else "jsonl"


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
