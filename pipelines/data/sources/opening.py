"""Opening of sources: chooses the reader for a layout."""

from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines.common.parquet_set import open_parquet
from pipelines.common.storage import Storage, existing_path, explained, open_path
from pipelines.data.sources.cifar import CifarSource
from pipelines.data.sources.detection import detect_format
from pipelines.data.sources.listing_layouts import LAYOUTS
from pipelines.data.sources.listings import ListingSource
from pipelines.data.sources.parquet import parquet_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Source
from pipelines.data.sources.tar import TarSource

FOLDERS = {"urban1k": ("caption", "image"), "dci": ("annotations", "photos")}
"""Folders of texts and of images, in layouts that have two."""


def open_source(
    field: str, value: str, settings: SourceSettings, storage: Storage, captions_required: bool = True
) -> Source:
    """Open the source that a setting names.

    Args:
        field: setting that `value` comes from, for messages.
        value: file, directory or URI.
        settings: format, or `auto`, and names of columns.
        storage: access to object storage.
        captions_required: whether a row without a caption has a problem.

    Raises:
        ConfigError: a setting does not apply to the layout.
        DataError: the path does not exist, or its layout is unknown.
    """
    path = existing_path(field, value, storage)
    with explained(field, value):
        kind = settings.format if settings.format != "auto" else detect_format(field, path, settings.encoding)
        images = open_path("source.images", settings.images, storage) if settings.images else _images_root(path, kind)
        _check_applicable(settings, kind)
        _check_folders(field, path, kind, settings)
        if kind == "cifar":
            return CifarSource(field, path)
        if kind == "parquet":
            data = open_parquet(field, value, storage, [])
            return parquet_source(field, data, settings, storage, images, captions_required=captions_required)
        if kind == "webdataset":
            return TarSource(field, path, settings, storage, captions_required)
        return ListingSource(field, path, kind, settings, storage, images, captions_required)


def _check_applicable(settings: SourceSettings, kind: str) -> None:
    """Refuse settings that a layout would ignore."""
    for names, kinds in ((("split", "first_rows"), tuple(LAYOUTS)), (("label", "keep"), ("parquet",))):
        for name in names:
            if getattr(settings, name) and kind not in kinds:
                raise ConfigError(f"source.{name} does not apply to {kind}, only to {', '.join(kinds)}; remove it")
    if settings.images and kind in ("webdataset", "cifar"):
        raise ConfigError(f"source.images does not apply to {kind}, which holds its images itself; remove it")


def _check_folders(field: str, path: UPath, kind: str, settings: SourceSettings) -> None:
    """Refuse a directory without the folders of its layout: it would be read as an empty set."""
    needed = FOLDERS.get(kind, ())[: 1 if settings.images else 2]
    missing = [f"{name}/" for name in needed if not (path / name).is_dir()]
    if missing:
        layout = " and ".join(f"{name}/" for name in FOLDERS[kind])
        raise DataError(f"{field}='{path}' has no {' and no '.join(missing)}; give the directory that has {layout}")


def _images_root(path: UPath, kind: str) -> UPath:
    if kind in FOLDERS:
        return path / FOLDERS[kind][1]
    if kind in ("folder", "imagefolder", "class_folders"):
        return path
    folder = path if path.is_dir() else path.parent
    return folder / "images" if (folder / "images").is_dir() else folder
