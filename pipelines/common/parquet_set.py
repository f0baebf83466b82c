"""Sets of Parquet files: early checks of those that are read, and a writer for those of the jobs."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import Dataset
from upath import UPath

from longclip.errors import DataError
from pipelines.common.file_listing import PARQUET_SUFFIXES, list_files
from pipelines.common.storage import Storage, arrow_filesystem, existing_path, explained

MANIFEST = "_manifest.json"
INCOMPLETE = "_INCOMPLETE"
"""Marker file in an output on object storage while it is being published, because objects cannot be renamed."""

ROWS_PER_GROUP = 128
MAX_GROUP_BYTES = 128 * 1024 * 1024
"""Groups of very large images have fewer rows, because a reader holds a whole group in memory."""

FOOTER_READERS = 16
MAX_CUTS = 16


@dataclass(frozen=True)
class ParquetFile:
    """A file as described by its footer."""

    path: UPath
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    schema: pa.Schema

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class ParquetSet:
    """Parquet files below one path; all have the columns that were asked for."""

    root: UPath
    files: tuple[ParquetFile, ...]
    others: str = ""
    """What other files there are below the root, for the log."""

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows of each row group of all files."""
        return tuple(rows for file in self.files for rows in file.row_groups)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the first file with rows."""
        return self.files[0].schema

    def pieces(self, rows: int) -> list[dict[str, Any]]:
        """Pieces of about `rows` rows: `file`, `first` row and number of `rows`, and a unique `name` (below the root)
        for an output file with the rows of the piece."""
        pieces = []
        base = self.root.path.rstrip("/")
        for file in self.files:
            spans = row_spans(file.row_groups, rows)
            name = file.path.path[len(base) + 1 :] or file.path.name
            for number, (first, count) in enumerate(spans):
                part = f"-{number:04d}" if len(spans) > 1 else ""
                pieces.append(
                    {
                        "file": str(file.path),
                        "first": first,
                        "rows": count,
                        "name": f"{name.removesuffix('.parquet')}{part}.parquet",
                    }
                )
        return pieces

    def dataset(self, columns: Sequence[str], **options: Any) -> Dataset:
        """The rows as a Ray dataset; `options` are those of `ray.data.read_parquet`."""
        paths = [file.path.path for file in self.files]
        filesystem = arrow_filesystem(self.root)
        # Without `file_extensions=None`, Ray passes over files that are not named `*.parquet`.
        dataset = ray.data.read_parquet(paths, filesystem=filesystem, file_extensions=None, **options)
        return dataset.select_columns(list(columns))


def open_parquet(
    field: str, value: str, storage: Storage, columns: Sequence[str], split: str | None = None
) -> ParquetSet:
    """The Parquet files of a setting. Reads only their footers, without Ray.

    Args:
        field: setting that contains `value`, for messages.
        value: Parquet file, directory or URI. Names that begin with `_` or `.` are ignored, links are followed.
        storage: access to object storage.
        columns: columns that every file must have.
        split: split to open if `value` has splits, as `prepare.py` writes them.

    Raises:
        DataError: there is no Parquet file or no row, the set is incomplete, or a column is missing.
    """
    root = existing_path(field, value, storage)
    with explained(field, value):
        if split and manifest_of(root).get("splits", {}).get(split):
            root = root / split
        paths, others = parquet_files(field, root)
        with ThreadPoolExecutor(FOOTER_READERS) as pool:
            files = tuple(pool.map(lambda path: _footer(field, root, path), paths))
    for file in (file for file in files if file.rows):
        missing = [column for column in columns if column not in file.schema.names]
        if missing:
            raise DataError(
                f"{field}='{value}': column '{missing[0]}' is missing in {file.path.name}; it has"
                f" {', '.join(file.schema.names)}; name yours with --set columns.<role>=<name>"
            )
        repeated = [column for column in columns if file.schema.names.count(column) > 1]
        if repeated:
            raise DataError(
                f"{field}='{value}': {file.path.name} has several columns that are called '{repeated[0]}'; rename all"
                " but one"
            )
    # Empty files, such as shards of which every download failed, often have columns without a type.
    data = ParquetSet(root, tuple(file for file in files if file.rows), others)
    if not data.files:
        raise DataError(f"{field}='{value}' has no rows; give a Parquet with at least one")
    return data


def is_list(schema: pa.Schema, column: str) -> bool:
    """Whether the cells of a column are lists."""
    return is_list_type(schema.field(column).type)


def is_list_type(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's list types."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(is_kind(kind) for is_kind in (*lists, *views))


def row_spans(row_groups: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of pieces of about `rows` rows.

    Small row groups are joined. A large one is cut, into at most `MAX_CUTS` pieces: each of them reads all that is
    before it in the group.
    """
    spans: list[tuple[int, int]] = []
    first = 0
    for group_rows in row_groups:
        if spans and spans[-1][1] + group_rows <= rows:
            spans[-1] = (spans[-1][0], spans[-1][1] + group_rows)
        elif group_rows:
            cuts = min(max(group_rows // rows, 1), MAX_CUTS)
            ends = [group_rows * number // cuts for number in range(cuts + 1)]
            spans += [(first + start, end - start) for start, end in pairwise(ends)]
        first += group_rows
    return spans


def manifest_of(root: UPath) -> dict[str, Any]:
    """Manifest of a set that a job of this project wrote; empty for any other."""
    try:
        return json.loads((root / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def parquet_files(field: str, root: UPath) -> tuple[list[UPath], str]:
    """All Parquet files at or below a path, sorted, and what other files there are, for the log.

    Raises:
        DataError: there are none, one cannot be read, or a job is publishing them or was killed while it did.
    """
    if root.is_dir() and (root / INCOMPLETE).exists():
        raise DataError(
            f"{field}='{root}' is incomplete: a job is publishing it or was killed while publishing; run that job again"
        )
    listing = list_files(root)
    return listing.data_files(field, PARQUET_SUFFIXES), listing.others(PARQUET_SUFFIXES) if root.is_dir() else ""


def _footer(field: str, root: UPath, path: UPath) -> ParquetFile:
    try:
        with pq.ParquetFile(path.path, filesystem=arrow_filesystem(root)) as file:
            groups = tuple(file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups))
            return ParquetFile(path, groups, file.schema_arrow)
    except pa.ArrowException as error:
        raise DataError(f"{field}='{path}' cannot be read as Parquet: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator["RowGroups"]:
    """Write a local Parquet file for streaming: row groups of `ROWS_PER_GROUP`, images not compressed again."""
    text = [field.name for field in schema if not pa.types.is_binary(field.type)]
    compression = {field.name: "zstd" if field.name in text else "none" for field in schema}
    with pq.ParquetWriter(path, schema, compression=compression, use_dictionary=False, write_statistics=text) as writer:
        groups = RowGroups(writer, schema)
        yield groups
        groups.flush()


class RowGroups:
    """Collects rows and writes them in groups of `ROWS_PER_GROUP`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.writer, self.schema = writer, schema
        self.rows = 0
        self.bytes = 0
        self._pending: list[pa.RecordBatch] = []

    def add(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows of the file's schema."""
        self._pending += rows.to_batches() if isinstance(rows, pa.Table) else [rows]
        self.rows += rows.num_rows
        self.bytes += rows.nbytes
        while sum(batch.num_rows for batch in self._pending) >= ROWS_PER_GROUP:
            self._write(ROWS_PER_GROUP)
        if sum(batch.nbytes for batch in self._pending) >= MAX_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the remaining rows."""
        if any(batch.num_rows for batch in self._pending):
            self._write(None)

    def _write(self, count: int | None) -> None:
        table = pa.Table.from_batches(self._pending, self.schema)
        self.writer.write_table(table.slice(0, count), row_group_size=ROWS_PER_GROUP)
        self._pending = table.slice(count).to_batches() if count else []
