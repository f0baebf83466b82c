"""Rows of a Parquet file, read so that neither a damaged row group nor a cell that is not UTF-8 ends a job."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.errors import one_line
from pipelines.common.storage import arrow_filesystem

BUFFER_BYTES = 8 * 1024 * 1024
"""Column chunks are read in parts of this size: a row group of a whole file does not have to fit into memory."""


@dataclass(frozen=True)
class Damaged:
    """Consecutive rows that cannot be decoded."""

    rows: int
    problem: str


def part_rows(part: pa.RecordBatch | Damaged) -> int:
    """Number of rows of a part that `read_rows` yields."""
    return part.rows if isinstance(part, Damaged) else part.num_rows


def read_rows(
    path: UPath, first: int, rows: int, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch | Damaged]:
    """Some rows of a file in their order. After damage, the next intact row group is read.

    Args:
        path: the file.
        first: number of the first row.
        rows: number of rows.
        batch_rows: maximum rows of a batch.
        columns: columns to read; None for all.

    Raises:
        OSError: storage failed after all retries.
    """
    filesystem = arrow_filesystem(path)
    with pq.ParquetFile(
        path.path, filesystem=filesystem, buffer_size=BUFFER_BYTES, page_checksum_verification=True
    ) as file:
        start = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            begin, end = max(first - start, 0), min(first + rows - start, size)
            if begin < end:
                options = {"batch_size": batch_rows, "row_groups": [group], "columns": columns, "use_threads": False}
                yield from _read_group(file, begin, end, options)
            start += size


def _read_group(file: pq.ParquetFile, begin: int, end: int, options: dict[str, Any]) -> Iterator[Any]:
    """Rows `begin` to `end` of a row group. Rows before `begin` cannot be skipped, only read."""
    position, done, problem = 0, begin, "the row group has fewer rows than the file says"
    try:
        for batch in file.iter_batches(**options):
            part = batch.slice(min(max(begin - position, 0), batch.num_rows), max(end - max(position, begin), 0))
            position += batch.num_rows
            if part.num_rows:
                done += part.num_rows
                yield part
            if position >= end:
                return
    except (pa.ArrowException, EOFError, OSError) as error:
        # Retrying does not help against data that Arrow cannot decode. It also raises a plain OSError for this;
        # errors of storage are subclasses or have an errno, and are raised.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        problem = one_line(error, 200)
    if done < end:
        yield Damaged(end - done, f"file is damaged at this row: {problem}")


def unreadable_cells(batch: pa.RecordBatch) -> dict[int, dict[str, str]]:
    """Cells that cannot be read, such as texts that are not UTF-8: row -> column -> reason."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        reasons: dict[int, dict[str, str]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for row, cell in enumerate(column):
                try:
                    cell.as_py()
                except ValueError as error:
                    kind = "is not valid UTF-8" if isinstance(error, UnicodeError) else "cannot be read"
                    reasons.setdefault(row, {})[name] = f"column '{name}' {kind}: {one_line(error, 100)}"
        return reasons
    return {}


def read_cells(batch: pa.RecordBatch) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Rows of a batch, with None for cells that cannot be read, and the reason for each row that has such a cell."""
    unreadable = unreadable_cells(batch)
    if not unreadable:
        return batch.to_pylist(), {}
    rows = []
    for row in range(batch.num_rows):
        bad = unreadable.get(row, {})
        rows.append({name: None if name in bad else batch[name][row].as_py() for name in batch.schema.names})
    return rows, {row: next(iter(reasons.values())) for row, reasons in unreadable.items()}
