"""Parquet with images as bytes, Hugging Face structs, paths or URIs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.errors import DataError
from pipelines.common.parquet_set import ParquetSet, is_list
from pipelines.common.storage import Storage, arrow_filesystem, open_path
from pipelines.data.sources.image_references import ImageReferences
from pipelines.data.sources.settings import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, SourceSettings, first_known
from pipelines.data.sources.source import Piece, SourceRow

BATCH_ROWS = 64
PROBLEM = "_problem"
"""Column of rows that are known to be broken, in Parquet that listings are turned into."""


@dataclass
class ParquetSource:
    """Parquet files of one schema, as far as it matters here."""

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
        """One line on what was found."""
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
            # What Arrow cannot decode, no retry mends. It says so with a plain OSError, too; those of storage are of a
            # kind or have a number, and pass.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            problem = f"file is damaged here: {' '.join(str(error).split())[:200]}"
            for row in range(done, piece.rows or done + 1):
                yield SourceRow(f"{self._stem(piece.file)}-{before + row:08d}", problem=problem)

    def _rows(self, batch: pa.RecordBatch, numbered: str, before: int) -> Iterator[SourceRow]:
        rows = batch.to_pylist()
        cells = [_image_cell(row[self.image]) for row in rows]
        places = [place for place, cell in enumerate(cells) if isinstance(cell, str) and not rows[place].get(PROBLEM)]
        fetched = dict(zip(places, self.references.fetch([str(cells[place]) for place in places]), strict=True))
        for place, row in enumerate(rows):
            key = row.get(self.id) if self.id else None
            image = fetched.get(place, cells[place])
            label = row[self.caption] if self.settings.label else None
            captions, problem = ([str(label)], None) if label is not None else caption_texts(row[self.caption])
            if isinstance(image, str):
                problem, image = problem or image or "image is absent", b""
            elif image is None:
                problem, image = problem or f"column '{self.image}' holds no image", b""
            elif len(image) > self.settings.max_image_bytes:
                limit = self.settings.max_image_bytes
                problem, image = f"image has {len(image)} bytes, source.max_image_bytes={limit} are allowed", b""
            yield SourceRow(
                id=numbered.format(before + place) if key in (None, "") else str(key),
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
    """A source over Parquet files.

    Raises:
        DataError: a column is missing or of another type in one of the files.
    """
    present = data.schema.names
    roles = {
        "image": first_known(settings.image, IMAGE_NAMES, present),
        "caption": first_known(settings.label or settings.caption, CAPTION_NAMES, present),
    }
    for role, column in roles.items():
        if column is None:
            wanted = getattr(settings, role)
            looked = f"'{wanted}'" if wanted else "any of the usual names"
            raise DataError(
                f"{field_name}='{data.root}': no {role} column ({looked}); it has {', '.join(present)}; name yours with"
                f" --set source.{role}=<column>"
            )
    key = first_known(settings.id, ID_NAMES, present)
    if settings.id and key is None:
        raise DataError(f"{field_name}='{data.root}': column '{settings.id}' is missing; it has {', '.join(present)}")
    needed = [*roles.values(), *settings.keep, *([key] if key else [])]
    for file in data.files:
        for column in needed:
            theirs = file.schema.field(column).type if column in file.schema.names else None
            ours = data.schema.field(column).type if column in present else None
            if theirs is None or ours is None or not _same_kind(theirs, ours):
                raise DataError(
                    f"{field_name}='{data.root}': column '{column}' is {theirs or 'missing'} in {file.path.name}, and"
                    f" {ours or 'missing'} in {data.files[0].path.name}; give files of one schema"
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


def caption_texts(cell: Any) -> tuple[list[str], str | None]:
    """Texts of a caption cell, and what is wrong with it."""
    if cell is None:
        return [], "caption is absent"
    texts = cell if isinstance(cell, list) else [cell]
    if all(isinstance(text, str) or text is None for text in texts):
        return [text for text in texts if text is not None], None
    wrong = next(text for text in texts if not isinstance(text, str))
    return [], f"caption is no text but {type(wrong).__name__}"


def _image_cell(cell: Any) -> bytes | str | None:
    """Bytes, or the reference to them."""
    if isinstance(cell, dict):
        return cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    return cell if isinstance(cell, bytes | str) else None


def _same_kind(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether two types differ in the width of their offsets at most."""
    return a == b or {str(a).removeprefix("large_"), str(b).removeprefix("large_")} in ({"binary"}, {"string"})
