"""Settings of a source, and the well-known names of its columns."""

import codecs
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

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
    "csv",
    "coco",
    "flickr30k",
    "urban1k",
    "folder",
    "imagefolder",
    "class_folders",
    "cifar",
]

ID_NAMES = ("id", "key", "uid", "example_id", "image_id", "__key__", "sha256")
IMAGE_NAMES = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image/key"),
    *(
        "image_path",
        "image_file",
        "file_name",
        "filename",
        "filepath",
        "path",
        "image_url",
        "image/url",
        "url",
        "images",
    ),
)
CAPTION_NAMES = (
    *("long_caption", "re_caption", "vlm_caption", "detailed_caption", "IIW", "description"),
    *("caption", "captions", "text", "txt", "conversations", "conversation", "messages"),
)
"""Long texts come first: recaptioned data sets keep the old, short caption in another column."""


def _without_repetitions(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)  # fails for codecs that are not of texts, too
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise ValueError("is not an encoding that Python knows; give one such as utf-8, cp1252 or utf-16-le") from error


Encoding = Annotated[str, AfterValidator(_known_encoding)]


class SourceSettings(Settings):
    """How the input is read."""

    format: Format = "auto"
    """Layout: parquet, webdataset (tars), sharegpt4v (JSON), docci, dci (annotations/), iiw, jsonl (objects in lines),
    csv (commas or tabs, with a header), coco (captions or Karpathy's splits), flickr30k (token file), urban1k (image/
    and caption/), folder (images with .txt or .json files next to them), imagefolder (metadata.jsonl or .csv). Output
    of img2dataset is parquet, webdataset or folder. `auto` detects all of these. For classification, never detected:
    class_folders (one folder of images per class), cifar (binary version)."""
    images: str | None = None
    """Directory or URI that image paths are relative to; null takes that of the annotations, or images/ in it."""
    id: str | None = None
    """Column or JSON field of the id; null takes the first well-known name, or numbers the rows. In tars, a field of
    the .json file; null takes the name that the files of a sample share."""
    image: str | None = None
    """Column or JSON field of the image: bytes, a struct of bytes and path, a path or a URI. In tars, what follows the
    name of the sample, such as `input.jpg`."""
    caption: str | None = None
    """Column or JSON field of the caption: a text, a list of texts or a conversation; null takes the first well-known
    name. In tars, a field of the .json file, or what follows the name of the sample, such as `outputs.txt`."""
    encoding: Encoding = "utf-8"
    """Encoding of text files without a byte-order mark, such as cp1252 or utf-16-le. Rows that do not decode are
    rejected."""
    label: str | None = None
    """Parquet column of the class, a name or number, for classification; replaces the caption."""
    split: str | None = None
    """Read only entries of this `split`; for JSON layouts that have one, such as DOCCI and Karpathy's."""
    first_rows: PositiveInt | None = None
    """Read only this number of entries; for layouts with one file per image."""
    keep: Annotated[list[str], AfterValidator(_without_repetitions)] = Field(default=[])
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
