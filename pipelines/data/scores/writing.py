"""The task that writes the kept rows of one piece of a Parquet, with their scores."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.files import file_sha256
from pipelines.common.parquet_rows import Damaged, part_rows, read_rows
from pipelines.common.parquet_set import ROWS_PER_GROUP, is_list, parquet_writer
from pipelines.common.storage import arrow_filesystem, explained, open_path
from pipelines.common.whole_files import make_directory, whole_file
from pipelines.data.scores.piece import SCORES, read_scores, row_scores
from pipelines.data.scores.settings import ScoreSettings


class WriteScored:
    """Writes the rows of a piece that are kept, with their scores."""

    def __init__(self, settings: ScoreSettings, roles: tuple[str, ...], scores: UPath, tree: UPath) -> None:
        """
        Args:
            settings: columns, and access to the storage of the input.
            roles: text columns that were scored.
            scores: directory of the scores.
            tree: directory of the output.
        """
        self.settings, self.roles, self.scores, self.tree = settings, roles, scores, tree

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Write a piece; see `pipelines.data.work_units.UnitTask`. `threshold` in the unit is the lowest score kept."""
        scores = read_scores(self.scores, number)
        if unit["threshold"] is not None:
            scores = scores.filter(pa.array(row_scores(scores) >= unit["threshold"]))
        target = self.tree / unit["name"]
        make_directory(target.parent)
        path = open_path("input", unit["file"], self.settings.storage)
        with explained("input", path):
            schema = output_schema(
                self.settings, self.roles, pq.read_schema(path.path, filesystem=arrow_filesystem(path))
            )
        numbers = scores["row"].to_numpy()
        first = 0
        with whole_file(target) as local:
            with parquet_writer(local, schema) as output:
                for part in self._read(path, unit):
                    begin, end = np.searchsorted(numbers, [first, first + part_rows(part)])
                    if not isinstance(part, Damaged):
                        kept = scores.slice(begin, end - begin)
                        output.add(self._with_scores(part.take(pa.array(numbers[begin:end] - first)), kept, schema))
                    first += part_rows(part)
            line = {"name": unit["name"], "rows": output.rows, "bytes": local.stat().st_size}
            line["sha256"] = file_sha256(local)
        return {"rows_in": first, "rows_out": output.rows, "rejected": 0, "file": line}

    def _read(self, path: UPath, unit: dict[str, Any]) -> Iterator[pa.RecordBatch | Damaged]:
        """Rows of the input; storage that fails while they are read is an error of the input, not of the output."""
        with explained("input", path):
            yield from read_rows(path, unit["first"], unit["rows"], ROWS_PER_GROUP)

    def _with_scores(self, rows: pa.RecordBatch, scores: pa.Table, schema: pa.Schema) -> pa.Table:
        table = pa.Table.from_batches([rows])
        for role, name in score_columns(self.settings, self.roles).items():
            values = scores[role].to_pylist()
            kind = schema.field(name).type
            cells = values if pa.types.is_list(kind) else [cell[0] if cell else None for cell in values]
            table = table.append_column(name, pa.array(cells, kind))
        return table.cast(schema)


def score_columns(settings: ScoreSettings, roles: tuple[str, ...]) -> dict[str, str]:
    """Output column of each role."""
    names = {"caption": settings.score_column, "summary": settings.summary_score_column}
    return {role: names[role] for role in roles}


def output_schema(settings: ScoreSettings, roles: tuple[str, ...], schema: pa.Schema) -> pa.Schema:
    """Schema of the output for the schema of an input; texts in lists have their scores in lists."""
    for role, name in score_columns(settings, roles).items():
        kind = SCORES if is_list(schema, getattr(settings.columns, role)) else pa.float32()
        schema = schema.append(pa.field(name, kind))
    return schema.remove_metadata()
