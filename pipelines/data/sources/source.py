"""The interface of all sources: pieces that are read independently, and their rows."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from upath import UPath

from pipelines.common.storage import explained

_NO_CAPTION = (
    "caption is missing",
    "entry has no caption",
    "sample has no caption",
    "image has no .txt file with its caption",
)


def only_lacks_caption(problem: str | None) -> bool:
    """Whether the problem of a row is that it has no caption, which a job that writes captions does not mind."""
    return problem is not None and problem.startswith(_NO_CAPTION)


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task reads: a whole file, or some of its rows."""

    file: str
    """Path or URI of the file."""
    first: int = 0
    """Number of the first row, where the layout numbers them."""
    rows: int | None = None
    """Rows in the piece, if known before reading; None for the whole file."""
    listed: str | None = None
    """Path of the source, if `file` is a list of images that was made from it."""

    @property
    def origin(self) -> str:
        """Path or URI that a user knows, for messages."""
        return self.listed or self.file


@dataclass
class SourceRow:
    """A row of a source. Problems are stored, not raised: one bad row must not end a job."""

    id: str
    image: bytes = b""
    """Encoded image file."""
    captions: list[str] = field(default_factory=list)
    """Texts, unchanged."""
    problem: str | None = None
    """Why the row is unusable, if the source already knows."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional columns to copy to the output."""


class Source(Protocol):
    """A set of images and captions. Instances are pickled and sent to the tasks that read them."""

    lists: bool
    """Whether a row has a list of captions, in the output too."""
    extra: pa.Schema
    """Additional columns to copy to the output."""

    def describe(self) -> str:
        """One line for the log: layout, path, number of files."""

    def pieces(self, scratch: UPath) -> list[Piece]:
        """The pieces, in the same order in every run over the same files.

        Args:
            scratch: existing directory that all tasks can read, for intermediate files.

        Raises:
            DataError: there is nothing usable, or a file cannot be read; the message names it.
        """

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """The rows of a piece in their order; only a few are in memory at a time.

        Raises:
            OSError: storage failed after all retries. A damaged file does not raise: rows that are lost have the
                `problem`.
        """


def read_piece(source: Source, field: str, piece: Piece) -> Iterator[SourceRow]:
    """The rows of a piece; storage that fails while they are read is an error of `field`, not of the output."""
    with explained(field, piece.file):
        yield from source.read(piece)


def planned_pieces(source: Source, field: str, value: str, scratch: UPath) -> list[dict[str, Any]]:
    """The pieces of the source that a setting names, as JSON values."""
    with explained(field, value):
        return [asdict(piece) for piece in source.pieces(scratch)]
