"""Parquet with images as bytes, Hugging Face structs, paths or URIs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from upath import UPath

from longclip.errors import DataError
from pipelines.common.parquet_rows import Damaged, read_cells, read_rows
from pipelines.common.parquet_set import ParquetSet
from pipelines.common.storage import Storage, open_path
from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.cells import bytes_of_lists, holds_lists, image_cell, like
from pipelines.data.sources.image_references import ImageReferences
from pipelines.data.sources.settings import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, SourceSettings, first_known
from pipelines.data.sources.source import Piece, SourceRow, only_lacks_caption

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
    caption: str | None
    references: ImageReferences
    settings: SourceSettings
    storage: Storage
    captions_required: bool = True
    lists: bool = False
    extra: pa.Schema = field(default_factory=lambda: pa.schema([]))

    def describe(self) -> str:
        """See `Source`."""
        kind = _type_of(self.data, self.image)
        caption = f"caption '{self.caption}' ({'lists' if self.lists else 'texts'})" if self.caption else "no captions"
        return (
            f"{self.name}: {len(self.data.files)} files, {self.data.rows} rows; id '{self.id or '(row number)'}',"
            f" image '{self.image}' ({kind}), {caption}{self.data.others}"
        )

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`."""
        return [
            Piece(piece["file"], piece["first"], piece["rows"])
            for piece in self.data.pieces(self.settings.rows_per_piece)
        ]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        path = open_path("input", piece.file, self.storage)
        columns = [self.image, *([self.caption] if self.caption else []), *self.extra.names]
        columns += [name for name in (self.id, PROBLEM) if name in self.data.schema.names]
        id_format, number = f"{self._stem(piece.file)}-{{:08d}}", piece.first
        for part in read_rows(path, piece.first, piece.rows or 0, BATCH_ROWS, list(dict.fromkeys(columns))):
            if isinstance(part, Damaged):
                for row in range(number, number + part.rows):
                    yield SourceRow(id_format.format(row), problem=part.problem)
                number += part.rows
            else:
                yield from self._rows(part, id_format, number)
                number += part.num_rows

    def _rows(self, batch: pa.RecordBatch, id_format: str, rows_before: int) -> Iterator[SourceRow]:
        rows, unreadable = read_cells(bytes_of_lists(batch, self.image))
        images = [image_cell(row[self.image]) for row in rows]
        to_fetch = [row for row, (image, _) in enumerate(images) if isinstance(image, str)]
        fetched = dict(zip(to_fetch, self.references.fetch([str(images[row][0]) for row in to_fetch]), strict=True))
        for number, row in enumerate(rows):
            key, key_problem = _key(row.get(self.id) if self.id else None)
            cell = row[self.caption] if self.caption else None
            label = cell if self.settings.label else None
            captions, caption_problem = (
                ([str(label)], None) if label is not None else caption_texts(cell, self.settings.encoding)
            )
            if len(captions) > 1 and not self.lists:
                caption_problem = caption_problem or (
                    f"row has {len(captions)} captions, but column '{self.caption}' is not of lists"
                )
            if not self.captions_required and only_lacks_caption(caption_problem):
                caption_problem = None
            image, image_problem = self._image(*images[number], fetched.get(number))
            yield SourceRow(
                id=key or id_format.format(rows_before + number),
                image=image,
                captions=captions,
                problem=row.get(PROBLEM) or unreadable.get(number) or key_problem or caption_problem or image_problem,
                extra={name: row[name] for name in self.extra.names},
            )

    def _image(
        self, image: bytes | str | None, problem: str | None, fetched: bytes | str | None
    ) -> tuple[bytes, str | None]:
        """Bytes of an image, empty if there are none, and the problem with it."""
        if isinstance(image, str):
            image, problem = (fetched, None) if isinstance(fetched, bytes) else (None, fetched)
        if image is None:
            return b"", problem or f"column '{self.image}' has no image"
        limit = self.settings.max_image_bytes
        if len(image) > limit:
            return b"", f"image has {len(image)} bytes, more than source.max_image_bytes={limit}"
        return image, problem

    def _stem(self, file: str) -> str:
        base = str(self.data.root).rstrip("/")
        relative = file[len(base) + 1 :] if file.startswith(f"{base}/") else file.rpartition("/")[2]
        return relative.removesuffix(".parquet")


def parquet_source(
    field_name: str,
    data: ParquetSet,
    settings: SourceSettings,
    storage: Storage,
    images: UPath,
    name: str = "parquet",
    captions_required: bool = True,
) -> ParquetSource:
    """Open Parquet files as a source.

    Raises:
        DataError: a column is missing, or its type differs between files.
    """
    present = data.schema.names
    prefix = field_name.removesuffix("input")
    roles = {
        "image": first_known(settings.image, IMAGE_NAMES, present),
        "caption": first_known(settings.label or settings.caption, CAPTION_NAMES, present),
    }
    for role, column in roles.items():
        configured = settings.image if role == "image" else settings.label or settings.caption
        if column is None and (role == "image" or captions_required or configured):
            searched = f"'{configured}'" if configured else "under any well-known name"
            raise DataError(
                f"{field_name}='{data.root}': no {role} column ({searched}); it has {', '.join(present)}; name"
                f" yours with --set {prefix}source.{role}=<column>"
            )
    key = first_known(settings.id, ID_NAMES, present)
    if settings.id and key is None:
        raise DataError(f"{field_name}='{data.root}': column '{settings.id}' is missing; it has {', '.join(present)}")
    for column in filter(None, (*roles.values(), key, *settings.keep)):
        _check_unique(field_name, data, column)
    for column in filter(None, (*roles.values(), key)):
        _check_types(field_name, data, column, like)
    for column in settings.keep:
        _check_types(field_name, data, column, _same_width_aside)
    image, caption = str(roles["image"]), roles["caption"]
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
        captions_required=captions_required,
        lists=caption is not None and holds_lists(_type_of(data, caption)),
        extra=pa.schema([(column, _type_of(data, column)) for column in settings.keep]),
    )


def _check_types(
    field_name: str, data: ParquetSet, column: str, same: Callable[[pa.DataType, pa.DataType], bool]
) -> None:
    expected = _type_of(data, column)
    for file in data.files:
        kind = file.schema.field(column).type if column in file.schema.names else None
        if expected is None or kind is None or not (pa.types.is_null(kind) or same(kind, expected)):
            first = next((file.path.name for file in data.files if column in file.schema.names), "all files")
            raise DataError(
                f"{field_name}='{data.root}': column '{column}' is {kind or 'missing'} in {file.path.name}, and"
                f" {expected or 'missing'} in {first}; give files with the same schema"
            )


def _check_unique(field_name: str, data: ParquetSet, column: str) -> None:
    for file in data.files:
        count = file.schema.names.count(column)
        if count > 1:
            raise DataError(
                f"{field_name}='{data.root}': {file.path.name} has {count} columns that are called '{column}'; rename"
                " all but one"
            )


def _type_of(data: ParquetSet, column: str) -> pa.DataType | None:
    """Type of a column; that of the first file in which it has a value, if there is one."""
    kinds = [file.schema.field(column).type for file in data.files if column in file.schema.names]
    return next((kind for kind in kinds if not pa.types.is_null(kind)), kinds[0] if kinds else None)


def _key(cell: Any) -> tuple[str, str | None]:
    """An id, empty if the cell has none, and the problem with it."""
    if isinstance(cell, bytes):
        try:
            return cell.decode(), None
        except UnicodeDecodeError as error:
            return "", f"id is not valid UTF-8: {error}"
    return "" if cell is None else str(cell), None


def _same_width_aside(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether two types differ at most in the width of their offsets."""
    return a == b or {str(a).removeprefix("large_"), str(b).removeprefix("large_")} in ({"binary"}, {"string"})
