"""WebDataset tars, such as those of img2dataset: a sample is consecutive files with the same key."""

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from upath import UPath

from longclip.errors import DataError
from pipelines.common.storage import Storage, open_path
from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.settings import CAPTION_NAMES, SourceSettings, first_known
from pipelines.data.sources.source import NO_CAPTION, Piece, SourceRow

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXT_SUFFIXES = (".txt", ".caption")
MAX_TEXT_BYTES = 1024 * 1024


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
        names = [path.path] if path.is_file() else sorted(path.fs.find(path.path))
        prefix = str(path)[: -len(path.path)] if str(path).endswith(path.path) else ""
        self.files = [prefix + name for name in names if name.endswith(TAR_SUFFIXES)]
        if not self.files:
            raise DataError(f"{field}='{path}' contains no tar file; give a .tar file or a directory with some")
        first = next(iter(self.read(Piece(self.files[0]))), None)
        if first is None:
            raise DataError(f"{field}='{self.files[0]}' contains no samples")
        self.lists = len(first.captions) > 1

    def describe(self) -> str:
        """See `Source`."""
        return f"webdataset: {len(self.files)} tars; captions are {'lists' if self.lists else 'texts'}"

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`; each tar is a piece, with a number of rows that is unknown before it is read."""
        return [Piece(file) for file in self.files]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        path = open_path("input", piece.file, self.storage)
        key, members = "", dict[str, Any]()
        with path.open("rb") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
                    for member in tar:
                        if not member.isfile():
                            continue
                        folder, _, name = member.name.rpartition("/")
                        stem, _, suffix = name.partition(".")
                        if f"{folder}/{stem}" != key and members:
                            yield self._sample(key, members)
                            members = {}
                        key = f"{folder}/{stem}"
                        members[f".{suffix.lower()}"] = self._content(tar, member)
            except (tarfile.TarError, EOFError, ValueError) as error:
                if members:
                    yield self._sample(key, members)
                yield SourceRow(path.name, problem=f"tar is truncated or damaged: {error}")
                return
        if members:
            yield self._sample(key, members)

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

    def _sample(self, key: str, members: dict[str, Any]) -> SourceRow:
        row = SourceRow(key.strip("/"))
        row.problem = next((content for content in members.values() if isinstance(content, str)), None)
        if row.problem:
            return row
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        row.captions, problem = self._captions(members)
        if problem in NO_CAPTION and not self.captions_required:
            problem = None
        row.image, row.problem = image or b"", "sample has no image" if image is None else problem
        return row

    def _captions(self, members: dict[str, Any]) -> tuple[list[str], str | None]:
        fields = {}
        if ".json" in members:
            try:
                fields = json.loads(members[".json"])
            except ValueError as error:
                return [], f".json file is not valid JSON: {error}"
        metadata = fields if isinstance(fields, dict) else {}
        name = first_known(self.settings.caption, CAPTION_NAMES, metadata)
        text = next((members[suffix] for suffix in TEXT_SUFFIXES if suffix in members), None)
        # img2dataset repeats the text in its .json file; a longer caption added later is only in that file.
        if name is not None and (text is None or self.settings.caption or name not in ("caption", "text", "txt")):
            return caption_texts(metadata[name])
        return ([text.decode("utf-8", errors="replace")], None) if text is not None else ([], "sample has no caption")
