"""Settings of a source, and the well-known names of its columns."""

from collections.abc import Collection
from typing import Literal

from pydantic import Field, PositiveInt

from pipelines.common.settings import Settings

Format = Literal[
    "auto",
    "parquet",
    "webdataset",
    "sharegpt4v",
    "docci",
    "dci",
    "iiw",
    "jsonl",
    "coco",
    "flickr30k",
    "urban1k",
    "folder",
    "class_folders",
    "cifar",
]

ID_NAMES = ("id", "key", "uid", "example_id", "image_id", "__key__", "sha256")
IMAGE_NAMES = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image/key"),
    *("image_path", "image_file", "file_name", "filename", "filepath", "path", "image_url", "image/url", "url"),
)
CAPTION_NAMES = (
    *("long_caption", "re_caption", "vlm_caption", "detailed_caption", "IIW", "description"),
    *("caption", "captions", "text", "txt", "conversations"),
)
"""Long texts come first: recaptioned data sets keep the old, short caption in another column."""


class SourceSettings(Settings):
    """How the input is read."""

    format: Format = "auto"
    """Layout: parquet, webdataset (tars), sharegpt4v (JSON), docci, dci (annotations/), iiw, jsonl (objects in lines),
    coco (captions or Karpathy's splits), flickr30k (token file), urban1k (image/ and caption/), folder (images with
    .txt files next to them). Output of img2dataset is parquet, webdataset or folder. `auto` detects all of these. For
    classification, never detected: class_folders (one folder of images per class), cifar (binary version)."""
    images: str | None = None
    """Directory or URI that image paths are relative to; null takes that of the annotations, or images/ in it."""
    id: str | None = None
    """Column or JSON field of the id; null takes the first well-known name, or numbers the rows."""
    image: str | None = None
    """Column or JSON field of the image: bytes, a struct of bytes and path, a path or a URI."""
    caption: str | None = None
    """Column or JSON field of the caption: a text or a list of texts; null takes the first well-known name."""
    label: str | None = None
    """Parquet column of the class, a name or number, for classification; replaces the caption."""
    split: str | None = None
    """Read only entries of this `split`; for JSON layouts that have one, such as DOCCI and Karpathy's."""
    first_rows: PositiveInt | None = None
    """Read only this number of entries; for layouts with one file per image."""
    keep: list[str] = Field(default=[])
    """Additional Parquet columns to copy to the output."""
    uri_schemes: list[str] = Field(default=["s3", "gs", "az", "abfs"])
    """Allowed schemes of image URIs. Download images on the web first, with img2dataset."""
    max_image_bytes: PositiveInt = 64 * 1024 * 1024
    """Maximum size of an image file."""
    rows_per_piece: PositiveInt = 1024
    """Rows per unit of work: what a killed job repeats at most, per worker."""


def first_known(named: str | None, known: Collection[str], present: Collection[str]) -> str | None:
    """The column of a role: the one that the settings name, or the first well-known name that is present."""
    if named is not None:
        return named if named in present else None
    return next((name for name in known if name in present), None)
