"""WebDataset tars, such as those of img2dataset: a sample is consecutive files with the same key."""

import bz2
import contextlib
import gzip
import itertools
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
from upath import UPath

from longclip.errors import DataError
from pipelines.common.file_listing import HIDDEN_MEDIA, list_files
from pipelines.common.storage import Storage, open_path
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Piece, SourceRow, only_lacks_caption
from pipelines.data.sources.suffixes import IMAGE_SUFFIXES, TAR_SUFFIXES
from pipelines.data.sources.tar_samples import Member, is_needed, samples
from pipelines.data.sources.text_decoding import printable

MAX_TEXT_BYTES = 1024 * 1024
MAX_LINKS = 8
"""Maximum number of links from a file to the next, as for a circle of them."""

PEEKED_SAMPLES = 256
"""Samples at the start that decide whether captions are lists."""


def _decompressed(stream: BinaryIO) -> BinaryIO:
    """The tar of a file that may be compressed. Python's reader of streams ends at the first of several compressed
    parts, as pbzip2 and bgzip write them, and does not compare checksums."""
    head = stream.read(6)
    stream.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if head.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(stream))
    return cast(BinaryIO, lzma.LZMAFile(stream)) if head == b"\xfd7zXZ\0" else stream


def _check_end(stream: BinaryIO) -> None:
    """Read what follows the end of an archive, which is padding.

    Raises:
        tarfile.ReadError: it is not, as in several tars that were joined to one file.
    """
    while chunk := stream.read(MAX_TEXT_BYTES):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("there is more data after its end; join tars with tar --concatenate")


class _StrictHeader(tarfile.TarInfo):
    """Raises an error at a missing or damaged header, which Python's reader treats as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


class TarSource:
    """Reads tars as streams, sample by sample, without unpacking them."""

    extra = pa.schema([])

    def __init__(
        self, field: str, path: UPath, settings: SourceSettings, storage: Storage, captions_required: bool = True
    ) -> None:
        self.settings, self.storage, self.captions_required = settings, storage, captions_required
        listing = list_files(path)
        self.files = [str(file) for file in listing.data_files(field, TAR_SUFFIXES)]
        self.others = listing.others(TAR_SUFFIXES) if path.is_dir() else ""
        rows = (row for file in self.files for row in self._samples(Piece(file)))
        first = list(itertools.islice(rows, PEEKED_SAMPLES))
        if not first:
            raise DataError(f"{field}='{path}' contains no samples in {len(self.files)} tars; give tars with images")
        self.lists = any(len(row.captions) > 1 for row in first)

    def describe(self) -> str:
        """See `Source`."""
        kind = "lists" if self.lists else "texts"
        return f"webdataset: {len(self.files)} tars; captions are {kind}{self.others}"

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`; each tar is a piece, with a number of rows that is unknown before it is read."""
        return [Piece(file) for file in self.files]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        for row in self._samples(piece):
            if row.image and not self.captions_required and only_lacks_caption(row.problem):
                row.problem = None
            if len(row.captions) > 1 and not self.lists:
                row.problem = row.problem or (
                    f"sample has {len(row.captions)} captions, but the first {PEEKED_SAMPLES} samples have one each"
                )
            yield row

    def _samples(self, piece: Piece) -> Iterator[SourceRow]:
        path = open_path("input", piece.file, self.storage)
        damage: list[str] = []
        with path.open("rb") as stream:
            yield from samples(self._members(path, stream, damage), self.settings)
        for reason in damage:
            yield SourceRow(path.name, problem=f"tar is truncated or damaged: {printable(reason)}")

    def _members(self, path: UPath, stream: BinaryIO, damage: list[str]) -> Iterator[Member]:
        """The files of a tar; what ends it early is added to `damage`."""
        links = _Links(path)
        try:
            plain = _decompressed(stream)
            with tarfile.open(fileobj=plain, mode="r|", tarinfo=_StrictHeader) as tar:
                for member in tar:
                    if not (member.isfile() or member.islnk() or member.issym()) or _is_hidden(member.name):
                        continue
                    if not is_needed(member.name, self.settings):
                        yield Member(member.name, "it is not needed")
                    elif member.isfile():
                        yield Member(member.name, self._content(tar, member))
                    else:
                        yield Member(member.name, links.target(member, self._content))
                _check_end(cast(BinaryIO, tar.fileobj))
        except (tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
            damage.append(str(error))
        except OSError as error:
            if error.errno is not None or type(error) is not OSError:
                raise
            damage.append(str(error))  # bz2 raises a plain OSError for damaged data
        finally:
            links.close()

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
        """Content of a file, or the reason why it is not read."""
        image = member.name.lower().endswith(IMAGE_SUFFIXES)
        limit = self.settings.max_image_bytes if image else MAX_TEXT_BYTES
        if member.size > limit:
            return f"'{member.name}' has {member.size} bytes; at most {limit} are allowed"
        file = tar.extractfile(member)
        content = file.read() if file else b""
        if len(content) < member.size:
            raise EOFError(f"'{member.name}' is truncated")
        return content


class _Links:
    """Finds the files that links in a tar lead to, through a second reader that is opened for the first of them."""

    def __init__(self, path: UPath) -> None:
        self.path = path
        self.stack = contextlib.ExitStack()
        self.tar: tarfile.TarFile | None = None
        self.by_name: dict[str, tarfile.TarInfo] = {}

    def target(
        self, link: tarfile.TarInfo, content: Callable[[tarfile.TarFile, tarfile.TarInfo], bytes | str]
    ) -> bytes | str:
        """What `content` gives for the file that a link leads to, or the reason why there is none."""
        if self.tar is None:
            stream = self.stack.enter_context(self.path.open("rb"))
            self.tar = self.stack.enter_context(tarfile.TarFile.open(fileobj=stream, mode="r:*"))
            self.by_name = {posixpath.normpath(member.name): member for member in self.tar}
        member: tarfile.TarInfo | None = link
        for _ in range(MAX_LINKS):
            if member is None or member.isfile():
                break
            folder = posixpath.dirname(member.name) if member.issym() else ""
            member = self.by_name.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
        if member is None or not member.isfile():
            return f"'{link.name}' is a link to '{link.linkname}', which is not a file of the tar"
        return content(self.tar, member)

    def close(self) -> None:
        """Close the second reader."""
        self.stack.close()


def _is_hidden(name: str) -> bool:
    """Whether a file is one that macOS adds (`._x.jpg`, `__MACOSX/`, `.DS_Store`) or otherwise hidden."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(HIDDEN_MEDIA) for part in parts)
