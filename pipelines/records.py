"""Rows in and out: an early, clear word on what is missing in a Parquet; rejected rows; whole outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray

from longclip.errors import DataError
from pipelines.settings import Settings


class Columns(Settings):
    """Names of the columns of a Parquet."""

    id: str = "id"
    """Unique key of a row."""
    image: str = "image"
    """Encoded image file (JPEG, PNG, WebP, ...) as binary."""
    caption: str = "caption"
    """Long text."""
    summary: str = "summary"
    """Short text."""


def check_parquet(field: str, path: str, columns: Sequence[str]) -> int:
    """Number of rows of a Parquet that has these columns. Reads the files' footers only, and needs no Ray.

    Args:
        field: setting that `path` came from, for messages.
        path: Parquet file, directory or URI.
        columns: columns that must exist.

    Raises:
        DataError: nothing is there, it is no Parquet, a column is missing, or there are no rows.
    """
    files = _parquet_files(field, path)
    rows = 0
    for name, schema, count in files:
        missing = [column for column in columns if column not in schema.names]
        if missing:
            raise DataError(
                f"{field}='{path}': column '{missing[0]}' is missing in {name}; it has {', '.join(schema.names)};"
                f" name yours with --set columns.<role>=<name>"
            )
        rows += count
    if not rows:
        raise DataError(f"{field}='{path}' has no rows; give a Parquet with at least one")
    return rows


def _parquet_files(field: str, path: str) -> list[tuple[str, pa.Schema, int]]:
    """Name, schema and number of rows of every Parquet file under a path."""
    try:
        filesystem, root = pafs.FileSystem.from_uri(path) if "://" in path else (pafs.LocalFileSystem(), path)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{field}='{path}' does not exist; give a Parquet file, directory or URI")
        if info.type == pafs.FileType.Directory:
            found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
            names = sorted(entry.path for entry in found if entry.path.endswith(".parquet"))
        else:
            names = [root]
        if not names:
            raise DataError(f"{field}='{path}' holds no .parquet file; give a directory that does")
        metadata = [(name, pq.ParquetFile(name, filesystem=filesystem)) for name in names]
        return [(Path(name).name, file.schema_arrow, file.metadata.num_rows) for name, file in metadata]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{field}='{path}' cannot be read as Parquet: {' '.join(str(error).split())[:300]}") from error


class Quarantine:
    """Collects rejected rows of a job, once each however often they are met, and stops it when they are too many."""

    def __init__(self, rows: int, max_rejected_fraction: float) -> None:
        self._allowed = max_rejected_fraction * rows
        self._limit = max_rejected_fraction
        self._reasons: dict[str, str] = {}

    def add(self, reasons: dict[str, str]) -> None:
        """Record `{id: reason}`; raises `DataError` when more rows are rejected than allowed."""
        self._reasons.update(reasons)
        if len(self._reasons) > self._allowed:
            row, reason = next(iter(self._reasons.items()))
            raise DataError(
                f"{len(self._reasons)} rows rejected, more than max_rejected_fraction={self._limit} allows;"
                f" the first is '{row}': {reason}"
            )

    def reasons(self) -> dict[str, str]:
        """All rejected ids with their reasons."""
        return self._reasons


def start_quarantine(rows: int, max_rejected_fraction: float) -> Any:
    """A `Quarantine` in a process of its own, for a job over `rows` rows: an actor handle."""
    return ray.remote(num_cpus=0)(Quarantine).remote(rows, max_rejected_fraction)


def write_quarantine(reasons: dict[str, str], stage: str, path: Path) -> None:
    """Write rejected rows as a Parquet `id, stage, reason`; nothing where there are none."""
    if reasons:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"id": list(reasons), "stage": [stage] * len(reasons), "reason": list(reasons.values())}
        pq.write_table(pa.table(table, schema=pa.schema([(name, pa.string()) for name in table])), path)
