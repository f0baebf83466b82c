"""Sources with one file per image: annotation files and folders are converted, once, to Parquet of image references.

From there on they are read as Parquet. Nothing is held in memory but the names of the files of folders, and the
captions of COCO, which it stores apart from its images.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pyarrow as pa
from upath import UPath

from longclip.errors import DataError, one_line
from pipelines.common.file_listing import HIDDEN_MEDIA, list_files
from pipelines.common.parquet_set import open_parquet, parquet_writer
from pipelines.common.storage import Storage
from pipelines.common.whole_files import whole_file
from pipelines.data.sources.entries import Entry, storable
from pipelines.data.sources.folder_layouts import BATCH_ENTRIES, SIDE_SUFFIXES
from pipelines.data.sources.listing_layouts import LAYOUTS
from pipelines.data.sources.parquet import PROBLEM, ParquetSource, parquet_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Piece, SourceRow, only_lacks_caption
from pipelines.data.sources.suffixes import IMAGE_SUFFIXES, METADATA_NAMES
from pipelines.data.sources.text_decoding import HINT

FILE = "entries.parquet"


class ListingSource:
    """A source with one file per image."""

    extra = pa.schema([])

    def __init__(
        self,
        field: str,
        path: UPath,
        kind: str,
        settings: SourceSettings,
        storage: Storage,
        images: UPath,
        captions_required: bool = True,
    ) -> None:
        self.field, self.path, self.kind = field, path, kind
        self.settings, self.storage, self.images = settings, storage, images
        self.captions_required = captions_required
        first = list(islice(self._entries(), BATCH_ENTRIES))
        if settings.split is not None and not first:
            raise DataError(f"{field}='{path}' has no entry with source.split='{settings.split}'; check the name")
        if not first:
            raise DataError(
                f"{field}='{path}' has no entry that {kind} could read; check the path, and give at least one image"
            )
        self.lists = any(len(entry.captions) > 1 for entry in first)
        self.table: ParquetSource | None = None

    def describe(self) -> str:
        """See `Source`."""
        others = ""
        if self.path.is_dir():
            others = list_files(self.path, HIDDEN_MEDIA).others((*IMAGE_SUFFIXES, *SIDE_SUFFIXES, *METADATA_NAMES))
        kind = "lists" if self.lists else "texts"
        return f"{self.kind}: {self.path}, images below {self.images}; captions are {kind}{others}"

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`; the entries are written to `scratch`."""
        path = scratch / FILE
        if not path.exists():
            schema = pa.schema([("id", pa.string()), ("image", pa.string()), ("caption", pa.list_(pa.string()))])
            schema = schema.append(pa.field(PROBLEM, pa.string()))
            entries = self._entries()
            with whole_file(path) as local, parquet_writer(local, schema) as output:
                while batch := list(islice(entries, BATCH_ENTRIES)):
                    rows = [
                        {"id": entry.id, "image": entry.image, "caption": entry.captions, PROBLEM: entry.problem}
                        for entry in batch
                    ]
                    output.add(pa.RecordBatch.from_pylist(rows, schema))
        return [replace(piece, listed=str(self.path)) for piece in self._table(path).pieces(scratch)]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        if self.table is None:
            self.table = self._table(UPath(piece.file, **self.storage.options(UPath(piece.file).protocol)))
        for row in self.table.read(piece):
            if len(row.captions) > 1 and not self.lists:
                row.problem = row.problem or "caption is a list, but in the first entries it is a text"
            yield row

    def _table(self, path: UPath) -> ParquetSource:
        data = open_parquet(self.field, str(path), self.storage, ["id"])
        # The table has fixed column names, and its images are below the root that was found.
        settings = self.settings.model_copy(
            update={"id": "id", "image": "image", "caption": "caption", "label": None, "keep": []}
        )
        return parquet_source(self.field, data, settings, self.storage, self.images, self.kind, self.captions_required)

    def _entries(self) -> Iterator[Entry]:
        try:
            wanted = self.settings.split
            entries = LAYOUTS[self.kind](self.path, self.images, self.settings)
            chosen = (entry for entry in entries if wanted in (None, entry.split))
            for entry in islice(chosen, self.settings.first_rows):
                usable = entry.image and not self.captions_required and only_lacks_caption(entry.problem)
                yield storable(replace(entry, problem=None) if usable else entry)
        except DataError as error:
            raise DataError(f"{self.field}='{self.path}' cannot be read as {self.kind}: it {error}") from error
        except UnicodeError as error:
            reason = f"{one_line(error, 200)}; {HINT}"
            raise DataError(f"{self.field}='{self.path}' cannot be read as {self.kind}: {reason}") from error
