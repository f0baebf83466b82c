"""Parquet with images as bytes, Hugging Face structs, paths or URIs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.errors import DataError, one_line
from pipelines.common.parquet_set import ParquetSet, is_list
from pipelines.common.storage import Storage, arrow_filesystem, open_path
from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.image_references import ImageReferences
from pipelines.data.sources.settings import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, SourceSettings, first_known
from pipelines.data.sources.source import Piece, SourceRow

BATCH_ROWS = 64
PROBLEM = "_problem"
"""Column with the problem of a row, in the Parquet that listings are converted to."""


@dataclass
class ParquetSource:
    """Parquet files whose relevant columns have the same types."""

    data: ParquetSet
    name: str
    id: str | None
    image: str
    caption: str
    references: ImageReferences
    settings: SourceSettings
    storage: Storage
    lists: bool = False
    extra: pa.Schema = field(default_factory=lambda: pa.schema([]))

    def describe(self) -> str:
        """See `Source`."""
        kind = self.data.schema.field(self.image).type
        return (
            f"{self.name}: {len(self.data.files)} files, {self.data.rows} rows; id '{self.id or '(row number)'}',"
            f" image '{self.image}' ({kind}), caption '{self.caption}' ({'lists' if self.lists else 'texts'})"
        )

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`."""
        return [
            Piece(piece["file"], piece["first"], piece["count"], piece["rows"])
            for piece in self.data.pieces(self.settings.rows_per_piece)
        ]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        path = open_path("input", piece.file, self.storage)
        columns = [self.image, self.caption, *self.extra.names]
        columns += [name for name in (self.id, PROBLEM) if name in self.data.schema.names]
        done = 0
        try:
            with pq.ParquetFile(path.path, filesystem=arrow_filesystem(path)) as file:
                metadata = file.metadata
                before = sum(metadata.row_group(group).num_rows for group in range(piece.first))
                groups = list(range(piece.first, piece.first + (piece.count or 0)))
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
                    yield from self._rows(batch, f"{self._stem(piece.file)}-{{:08d}}", before + done)
                    done += batch.num_rows
        except (pa.ArrowException, EOFError, OSError) as error:
            # Retrying does not help against data that Arrow cannot decode. It also raises a plain OSError for this;
            # errors of storage are subclasses or have an errno, and are raised.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            problem = f"file is damaged at this row: {one_line(error, 200)}"
            for row in range(done, piece.rows or done + 1):
                yield SourceRow(f"{self._stem(piece.file)}-{before + row:08d}", problem=problem)

    def _rows(self, batch: pa.RecordBatch, id_format: str, rows_before: int) -> Iterator[SourceRow]:
        rows = batch.to_pylist()
        cells = [_image_cell(row[self.image]) for row in rows]
        to_fetch = [row for row, cell in enumerate(cells) if isinstance(cell, str) and not rows[row].get(PROBLEM)]
        fetched = dict(zip(to_fetch, self.references.fetch([str(cells[row]) for row in to_fetch]), strict=True))
        for number, row in enumerate(rows):
            key = row.get(self.id) if self.id else None
            image = fetched.get(number, cells[number])
            label = row[self.caption] if self.settings.label else None
            captions, problem = ([str(label)], None) if label is not None else caption_texts(row[self.caption])
            if isinstance(image, str):
                problem, image = problem or image or "image is missing", b""
            elif image is None:
                problem, image = problem or f"column '{self.image}' has no image", b""
            elif len(image) > self.settings.max_image_bytes:
                limit = self.settings.max_image_bytes
                problem, image = f"image has {len(image)} bytes, more than source.max_image_bytes={limit}", b""
            yield SourceRow(
                id=id_format.format(rows_before + number) if key in (None, "") else str(key),
                image=image,
                captions=captions,
                problem=row.get(PROBLEM) or problem,
                extra={name: row[name] for name in self.extra.names},
            )

    def _stem(self, file: str) -> str:
        base = str(self.data.root).rstrip("/")
        relative = file[len(base) + 1 :] if file.startswith(f"{base}/") else file.rpartition("/")[2]
        return relative.removesuffix(".parquet")


def parquet_source(
    field_name: str, data: ParquetSet, settings: SourceSettings, storage: Storage, images: UPath, name: str = "parquet"
) -> ParquetSource:
    """Open Parquet files as a source.

    Raises:
        DataError: a column is missing, or its type differs between files.
    """
    present = data.schema.names
    roles = {
        "image": first_known(settings.image, IMAGE_NAMES, present),
        "caption": first_known(settings.label or settings.caption, CAPTION_NAMES, present),
    }
    for role, column in roles.items():
        if column is None:
            configured = getattr(settings, role)
            searched = f"'{configured}'" if configured else "under any well-known name"
            raise DataError(
                f"{field_name}='{data.root}': no {role} column ({searched}); it has {', '.join(present)}; name"
                f" yours with --set source.{role}=<column>"
            )
    key = first_known(settings.id, ID_NAMES, present)
    if settings.id and key is None:
        raise DataError(f"{field_name}='{data.root}': column '{settings.id}' is missing; it has {', '.join(present)}")
    needed = [*roles.values(), *settings.keep, *([key] if key else [])]
    for file in data.files:
        for column in needed:
            file_type = file.schema.field(column).type if column in file.schema.names else None
            first_type = data.schema.field(column).type if column in present else None
            if file_type is None or first_type is None or not _same_kind(file_type, first_type):
                raise DataError(
                    f"{field_name}='{data.root}': column '{column}' is {file_type or 'missing'} in {file.path.name},"
                    f" and {first_type or 'missing'} in {data.files[0].path.name}; give files with the same schema"
                )
    image, caption = str(roles["image"]), str(roles["caption"])
    references = ImageReferences(images, settings.uri_schemes, settings.max_image_bytes, storage)
    return ParquetSource(
        data=data,
        name=name,
        id=key,
        image=image,
        caption=caption,
        references=references,
        settings=settings,
        storage=storage,
        lists=is_list(data.schema, caption),
        extra=pa.schema([data.schema.field(column).remove_metadata() for column in settings.keep]),
    )


def _image_cell(cell: Any) -> bytes | str | None:
    """Bytes of an image, or a reference to it."""
    if isinstance(cell, dict):
        return cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    return cell if isinstance(cell, bytes | str) else None


def _same_kind(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether two types differ at most in the width of their offsets."""
    return a == b or {str(a).removeprefix("large_"), str(b).removeprefix("large_")} in ({"binary"}, {"string"})
