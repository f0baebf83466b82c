"""Rows of a set of questions: an image, or a box of one, and the texts that are compared with it."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from upath import UPath

from longclip.errors import ImageError
from longclip.images import decode_image
from pipelines.common.storage import Storage
from pipelines.data.sources.image_references import ImageReferences
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Piece, SourceRow
from pipelines.evaluation.scores import Score

FETCHED_AT_ONCE = 64


@dataclass(frozen=True)
class Row:
    """An image and its texts."""

    id: str
    image: str
    """Path of the file, relative to the root of the images."""
    texts: list[str]
    box: tuple[float, float, float, float] | None = None
    """Left, top, width and height in pixels of the part that is shown; None for the whole image."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a row, of unit length."""

    image: np.ndarray
    """`[D]`."""
    texts: np.ndarray
    """`[k, D]` of its k texts."""

    def similarities(self) -> np.ndarray:
        """`[k]` of the image and each of the texts."""
        return self.texts @ self.image


class QuestionSet(Protocol):
    """Questions about rows. What a question asks, and what its answer is worth, is the set's own business."""

    rows: Sequence[Row]

    def scores(self, embedded: Mapping[str, Embedded]) -> dict[str, Score]:
        """The score of each figure that the set has.

        Args:
            embedded: embeddings by the id of the row. Questions about rows that are not there are left out.
        """


class RowSource:
    """The rows of a set of questions as a `Source`."""

    lists = True
    extra = pa.schema([])

    def __init__(
        self, name: str, root: UPath, images: UPath, rows: Sequence[Row], settings: SourceSettings, storage: Storage
    ) -> None:
        """
        Args:
            name: of the layout.
            root: directory of the annotations, for messages.
            images: root of the images.
            rows: the rows.
            settings: limits of images, and rows per piece.
            storage: access to object storage.
        """
        self.name, self.root, self.images = name, root, images
        self.rows, self.rows_per_piece = rows, settings.rows_per_piece
        self.references = ImageReferences(images, settings.uri_schemes, settings.max_image_bytes, storage)

    def describe(self) -> str:
        """See `Source`."""
        return f"{self.name}: {self.root}, images below {self.images}"

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`."""
        starts = range(0, len(self.rows), self.rows_per_piece)
        return [Piece(str(self.root), start, min(self.rows_per_piece, len(self.rows) - start)) for start in starts]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        rows = self.rows[piece.first : piece.first + (piece.rows or 0)]
        for start in range(0, len(rows), FETCHED_AT_ONCE):
            chunk = rows[start : start + FETCHED_AT_ONCE]
            for row, content in zip(chunk, self.references.fetch([row.image for row in chunk]), strict=True):
                image, problem = (b"", content) if isinstance(content, str) else _shown(row, content)
                yield SourceRow(row.id, image, row.texts, problem)


def _shown(row: Row, content: bytes) -> tuple[bytes, str | None]:
    """The image file of a row, and the problem with it. A box is cut out, without loss."""
    if row.box is None:
        return content, None
    left, top, width, height = row.box
    try:
        image = decode_image(content)
    except ImageError as error:
        return b"", str(error)
    # Whole pixels as FG-CLIP 2's script has them, but never an empty box.
    box = (int(left), int(top), max(int(left + width), int(left) + 1), max(int(top + height), int(top) + 1))
    if box[0] < 0 or box[1] < 0 or box[2] > image.width or box[3] > image.height:
        return b"", f"box {list(row.box)} is not within the image of {image.width} x {image.height} pixels"
    out = io.BytesIO()
    image.crop(box).save(out, "PNG")
    return out.getvalue(), None


def image_groups(rows: Sequence[Row]) -> dict[str, int]:
    """Number of the image file of each row, by the row's id: rows of one image are not independent."""
    files = {name: number for number, name in enumerate(sorted({row.image for row in rows}))}
    return {row.id: files[row.image] for row in rows}
