"""What every source is made of: pieces that are read on their own, and the rows in them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from upath import UPath


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task reads: a whole file, or some of its row groups."""

    file: str
    """Path or URI of the file."""
    first: int = 0
    """First row group, where the file has row groups."""
    count: int | None = None
    """Number of row groups; None for the whole file."""
    rows: int | None = None
    """Rows in the piece, where that is known before it is read."""


@dataclass
class SourceRow:
    """A row as the source has it. What is wrong with it is said, not raised: one bad row must not end a job."""

    id: str
    image: bytes = b""
    """Encoded image file."""
    captions: list[str] = field(default_factory=list)
    """Texts as they stand there."""
    problem: str | None = None
    """Why the row cannot be used, if the source already knows."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further columns to hand on."""


class Source(Protocol):
    """A set of images and captions. Instances travel to the tasks that read them."""

    lists: bool
    """Whether a row has a list of captions; they stay lists."""
    extra: pa.Schema
    """Further columns to hand on."""

    def describe(self) -> str:
        """What was found, in one line: layout, place, files."""

    def pieces(self, scratch: UPath) -> list[Piece]:
        """The pieces in a fixed order, the same in every run over the same files.

        Args:
            scratch: existing directory on storage that all tasks see, for what is written once on the way.

        Raises:
            DataError: nothing usable is there, or a file cannot be read; its name is in the message.
        """

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """The rows of a piece in their order; few are in memory at a time.

        Raises:
            OSError: storage failed after all retries. A broken file instead ends the piece with a row whose `problem`
                says so.
        """
