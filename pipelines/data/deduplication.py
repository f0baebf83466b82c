"""Deduplication of staged rows, and their arrangement in output files."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.files import file_sha256
from pipelines.common.parquet_set import parquet_writer
from pipelines.common.rejected_rows import Rejected
from pipelines.common.storage import arrow_filesystem
from pipelines.common.whole_files import make_directory, whole_file
from pipelines.data.cleaning import SPLITS, staged_path
from pipelines.data.settings import KEY

READERS = 16
MIN_FILES, MIN_ROWS_PER_FILE = 16, 512
"""Small data sets get more files than `file_bytes` requires: training reads files in parallel and shuffles them."""


Part = tuple[int, str]
"""Number of a unit, and a split: one staged file."""


@dataclass(frozen=True)
class Arrangement:
    """The files of the output, and the rows that are left out."""

    files: list[dict[str, Any]]
    """One unit of work per file: its `name` and `parts`, each `[unit number, split, runs of rows, new ids by row]`, see
    `_runs`."""
    duplicates: Rejected
    """Rows that are left out, with the row that each duplicates."""
    renamed: int
    """Rows that got another id, because an earlier row has theirs."""


def arrange(
    folder: UPath, results: Sequence[dict[str, Any]], file_bytes: int, source: str, names: Sequence[str]
) -> Arrangement:
    """Decide which staged rows go into which file. Depends on the staged rows only, not on the order of their creation.

    Of duplicates, the first in the order of the source is kept. Of other rows with the same id, the first keeps it and
    the others get that of `unique_ids`. Needs about 100 bytes of memory per row, twice as much if ids repeat.

    Args:
        folder: directory of the staged pieces.
        results: results of `CleanPiece`, in the order of the units.
        file_bytes: target size of a file.
        source: name of the source, for the quarantine.
        names: name of the file that each unit comes from, for ids.
    """
    parts = [(number, split) for number, result in enumerate(results) for split in SPLITS if result["splits"][split]]
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(lambda part: _read_keys(staged_path(folder, *part)), parts))
    keys = pa.concat_tables(tables) if tables else pa.table({"id": [], KEY: []})
    duplicates = Rejected(source)
    drop = np.zeros(keys.num_rows, dtype=bool)
    ends = np.cumsum([table.num_rows for table in tables], dtype=np.int64)
    starts = ends - [table.num_rows for table in tables]

    def part_of(row: int) -> int:
        return int(np.searchsorted(ends, row, side="right"))

    def name_of(row: int) -> str:
        return names[parts[part_of(row)][0]]

    repeated_keys = _repeated(keys[KEY], drop)
    drop[[row for row, _ in repeated_keys]] = True
    new_ids = unique_ids(keys["id"], [row for row, _ in _repeated(keys["id"], drop)], name_of)
    for row, first in repeated_keys:
        reason = f"same image as '{new_ids.get(first, keys['id'][first])}'"
        duplicates.add(keys["id"][row].as_py(), "deduplicate", reason, source=f"{source}: {name_of(row)}")
    new_ids_of: dict[Part, dict[int, str]] = defaultdict(dict)
    for row, new_id in new_ids.items():
        new_ids_of[parts[part_of(row)]][row - int(starts[part_of(row)])] = new_id
    kept = {
        part: np.flatnonzero(~drop[start:end])
        for part, start, end in zip(parts, starts.tolist(), ends.tolist(), strict=True)
    }
    sizes = {part: results[part[0]]["bytes"][part[1]] / results[part[0]]["splits"][part[1]] for part in parts}
    files = [file for split in SPLITS for file in _files(split, kept, sizes, file_bytes, new_ids_of)]
    return Arrangement(files, duplicates, len(new_ids))


def unique_ids(ids: pa.ChunkedArray, repeated: Sequence[int], name_of: Callable[[int], str]) -> dict[int, str]:
    """New ids of rows whose ids an earlier row has: `<file>/<id>`, and a number behind that if this id exists, too.

    Args:
        ids: ids of all rows.
        repeated: the rows that need another id, in their order.
        name_of: name of the file that a row comes from.
    """
    taken = set(ids.to_pylist()) if repeated else set()
    numbers = Counter[str]()
    new_ids = {}
    for row in repeated:
        plain = key = f"{name_of(row)}/{ids[row]}"
        while key in taken:
            numbers[plain] += 1
            key = f"{plain}-{numbers[plain] + 1}"
        taken.add(key)
        new_ids[row] = key
    return new_ids


def _read_keys(path: UPath) -> pa.Table:
    return pq.read_table(path.path, columns=["id", KEY], filesystem=arrow_filesystem(path))


def _repeated(column: pa.ChunkedArray, drop: np.ndarray) -> list[tuple[int, int]]:
    """(row, first row with the same value) among the rows that are not dropped yet; nulls are never equal."""
    remaining = np.flatnonzero(~drop & column.is_valid().to_numpy())
    codes = column.take(pa.array(remaining)).combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    firsts = remaining[first[inverse]]
    repeated = remaining != firsts
    return list(zip(remaining[repeated].tolist(), firsts[repeated].tolist(), strict=True))


def _files(
    split: str,
    kept: dict[Part, np.ndarray],
    sizes: dict[Part, float],
    file_bytes: int,
    new_ids: Mapping[Part, dict[int, str]],
) -> Iterator[dict[str, Any]]:
    """Units of the files of a split: about `file_bytes` each, evenly filled, in the order of the source."""
    parts = [part for part in kept if part[1] == split and len(kept[part])]
    rows = sum(len(kept[part]) for part in parts)
    total = sum(len(kept[part]) * sizes[part] for part in parts)
    count = max(round(total / file_bytes), min(MIN_FILES, rows // MIN_ROWS_PER_FILE), 1)
    filled, number = 0.0, 0
    file_parts: list[list[Any]] = []
    for part in parts:
        # The bytes before a row decide its file.
        bytes_before = filled + sizes[part] * np.arange(len(kept[part]))
        file_of_row = np.minimum((bytes_before * count / max(total, 1)).astype(int), count - 1)
        for file in np.unique(file_of_row).tolist():
            if file != number and file_parts:
                yield {"name": f"{split}/part-{number:05d}.parquet", "parts": file_parts}
                file_parts = []
            number = file
            chosen = kept[part][file_of_row == file]
            ids = {row: new_id for row, new_id in new_ids.get(part, {}).items() if chosen[0] <= row <= chosen[-1]}
            file_parts.append([*part, _runs(chosen), list(ids.items())])
        filled += sizes[part] * len(kept[part])
    if file_parts:
        yield {"name": f"{split}/part-{number:05d}.parquet", "parts": file_parts}


def _runs(rows: np.ndarray) -> list[list[int]]:
    """`[first, last + 1]` of each run of consecutive row numbers."""
    breaks = np.flatnonzero(np.diff(rows) > 1)
    return np.stack([rows[np.r_[0, breaks + 1]], rows[np.r_[breaks, len(rows) - 1]] + 1], axis=1).tolist()


class WriteFile:
    """Writes an output file from staged rows."""

    def __init__(self, folder: UPath, tree: UPath, schema: pa.Schema) -> None:
        """
        Args:
            folder: directory of the staged pieces.
            tree: directory of the output.
            schema: columns of the output.
        """
        self.folder, self.tree, self.schema = folder, tree, schema

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Write a file; see `pipelines.data.work_units.UnitTask`. The result has the `file` entry of the manifest."""
        path = self.tree / unit["name"]
        make_directory(path.parent)
        with whole_file(path) as local:
            with parquet_writer(local, self.schema) as groups:
                for unit_number, split, runs, new_ids in unit["parts"]:
                    for first, rows in _read_runs(staged_path(self.folder, unit_number, split), runs):
                        groups.add(_with_ids(rows, first, dict(new_ids)).select(self.schema.names))
            line = {"name": unit["name"], "rows": groups.rows, "bytes": local.stat().st_size}
            line["sha256"] = file_sha256(local)
        return {"rows_in": groups.rows, "rows_out": groups.rows, "rejected": 0, "file": line}


def _with_ids(rows: pa.Table, first: int, new_ids: dict[int, str]) -> pa.Table:
    """Rows with new ids where there are any, by number of the row; `first` is that of the first one."""
    if not any(first <= row < first + rows.num_rows for row in new_ids):
        return rows
    ids = [new_ids.get(first + row, key) for row, key in enumerate(rows["id"].to_pylist())]
    return rows.set_column(rows.schema.get_field_index("id"), "id", pa.array(ids, pa.string()))


def _read_runs(path: UPath, runs: list[list[int]]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of some runs with the number of the first, one row group at a time; other row groups are not read."""
    with pq.ParquetFile(path.path, filesystem=arrow_filesystem(path)) as file:
        before = 0
        for group in range(file.metadata.num_row_groups):
            after = before + file.metadata.row_group(group).num_rows
            spans = [(max(first, before), min(last, after)) for first, last in runs if first < after and last > before]
            if spans:
                table = file.read_row_group(group)
                for first, last in spans:
                    yield first, table.slice(first - before, last - first)
            before = after
