"""Settings of `prepare.py`. Imports neither Ray nor torch: `--help` needs this module."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipelines.common.settings import Settings
from pipelines.common.storage import Storage
from pipelines.data.sources.settings import SourceSettings

COLUMNS = ("id", "image", "caption", "width", "height", "sha256", "phash", "caption_tokens")
"""Columns of the output, without those of source.keep."""

KEY = "_key"
"""Column of the staged rows that duplicates share."""


class ImageLimits(Settings):
    """Which images are used."""

    max_pixels: PositiveInt = 64_000_000
    """Maximum width x height, checked before decoding."""
    min_side: PositiveInt = 16
    """Minimum side: smaller images are spacers and tracking pixels."""


class ImageSettings(ImageLimits):
    """How images are checked and re-encoded."""

    short_side: PositiveInt | None = None
    """Reduce images with a longer short side to this one, as JPEG. 288 suits training at 224 pixels and makes every
    later pass several times faster. null keeps the files as they are."""


class CleanSettings(Settings):
    """What makes a row clean."""

    image: ImageSettings = ImageSettings()
    max_caption_characters: PositiveInt = 20_000
    """Maximum length of a caption; longer texts are web pages, not descriptions."""
    deduplicate: Literal["image", "row", "none"] = "image"
    """What makes a row a duplicate: the same image file (even with another caption: within a batch it would be a false
    negative), the same image file and caption, or nothing. The first row in the order of the source is kept."""
    val_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of images in the split `val`, chosen by the image's hash: the same in every run."""
    overlap_distance: int = Field(2, ge=0, le=16)
    """Maximum number of differing bits, of 64, between the perceptual hashes of an image and of its copy in an
    evaluation set."""


class EvaluationSet(Settings):
    """An evaluation set whose images are left out: `--set exclude_overlap_with.docci.input=/data/docci`."""

    input: str
    """File, directory or URI of the evaluation set, in any supported layout."""
    source: SourceSettings = SourceSettings()
    """How it is read. Nothing is taken from the settings of the job's own input."""
    max_unreadable_fraction: float = Field(0.0, ge=0, le=1)
    """Maximum share of its images that cannot be read: what is in them would stay in the output."""


def _by_name(value: Any) -> Any:
    """Evaluation sets by name: a path, or each path of a list, is a set with the name of its file or directory."""
    if isinstance(value, str | list):
        named: dict[str, Any] = {}
        for path in [value] if isinstance(value, str) else value:
            stem = re.sub(r"[^\w@-]", "-", PurePosixPath(str(path)).stem) or "set"
            number = next(number for number in range(1, len(named) + 2) if _numbered(stem, number) not in named)
            named[_numbered(stem, number)] = path
        value = named
    if not isinstance(value, dict):
        return value
    return {name: {"input": entry} if isinstance(entry, str) else entry for name, entry in value.items()}


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


class PrepareSettings(CleanSettings):
    """All settings of the job."""

    input: str
    """File, directory or URI of images with captions; source.format lists the supported layouts."""
    output: str
    """Directory or URI of the clean data set."""
    source: SourceSettings = SourceSettings()
    exclude_overlap_with: Annotated[dict[str, EvaluationSet], BeforeValidator(_by_name)] = Field(default={})
    """Evaluation sets whose images are left out: a path, a list of paths, or sets by name, each with `input` and maybe
    `source` (as for the input) and `max_unreadable_fraction` (default 0)."""
    file_megabytes: PositiveInt = 256
    """Target size of an output file."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """Maximum share of unusable rows before the job fails. Duplicates and overlaps do not count."""
    overwrite: bool = False
    """Replace an existing output, or unfinished work, that was made with other settings or data."""
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _kept_columns_are_others(self) -> Self:
        for name in self.source.keep:
            if name in (*COLUMNS, KEY):
                raise ValueError(f"source.keep='{name}' is a column of the output ({', '.join(COLUMNS)}); remove it")
        return self


NOT_IN_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("output", "storage", "overwrite", "max_rejected_fraction"), True),
    "exclude_overlap_with": {"__all__": {"max_unreadable_fraction"}},
}
"""Settings that do not affect the content of the output: a rerun that changes them continues the same work."""
