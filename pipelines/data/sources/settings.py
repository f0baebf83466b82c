"""How a source is read, and what its columns are called when nobody says."""

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
"""Long texts come first: sets that were recaptioned keep the old, short caption beside them."""


class SourceSettings(Settings):
    """How the input is read."""

    format: Format = "auto"
    """Layout: parquet, webdataset (tars), sharegpt4v (JSON), docci, dci (annotations/), iiw, jsonl (one object a line),
    coco (captions or Karpathy's splits), flickr30k (token file), urban1k (image/ and caption/), folder (images with
    .txt beside them). Output of img2dataset is parquet, webdataset or folder. `auto` looks at the files. For
    classification, never found by themselves: class_folders (a folder of images a class), cifar (binary version)."""
    images: str | None = None
    """Directory or URI that image paths are relative to; empty takes the place of the annotations, or images/ there."""
    id: str | None = None
    """Column or JSON field of the key; empty takes the first known name, or numbers the rows."""
    image: str | None = None
    """Column or JSON field of the image: bytes, a struct of bytes and path, a path or a URI."""
    caption: str | None = None
    """Column or JSON field of the caption: a text or a list of texts; empty takes the first known name."""
    label: str | None = None
    """Parquet column of a class, a name or a number, for classification: it takes the caption's place."""
    split: str | None = None
    """Take only entries whose `split` is this; JSON layouts that have one, such as DOCCI and Karpathy's."""
    first_rows: PositiveInt | None = None
    """Take only the first entries of a layout whose images stand in files of their own."""
    keep: list[str] = Field(default=[])
    """Further Parquet columns to hand on."""
    uri_schemes: list[str] = Field(default=["s3", "gs", "az", "abfs"])
    """Schemes of image URIs that may be followed. Images on the web are better downloaded first, with img2dataset."""
    max_image_bytes: PositiveInt = 64 * 1024 * 1024
    """Largest image file."""
    rows_per_piece: PositiveInt = 1024
    """Rows that are done, and after a kill done again, as one."""


def first_known(named: str | None, known: Collection[str], present: Collection[str]) -> str | None:
    """The column of a role: the one that the settings name, or the first known name that is present."""
    if named is not None:
        return named if named in present else None
    return next((name for name in known if name in present), None)
