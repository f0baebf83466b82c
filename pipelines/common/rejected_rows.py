"""Rejected rows: collected with their reasons, limited to a share of all rows, and kept in a quarantine file.

Jobs that work in pieces collect a `Rejected` for each piece and count them with a `RejectedLimit`. Jobs that stream
rows through Ray Data report them to a `Quarantine`, an actor.
"""

import re
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from longclip.errors import DataError
from pipelines.common.thumbnails import thumbnail
from pipelines.common.whole_files import whole_file

QUARANTINE = "quarantine.parquet"
"""File of rejected rows in an output. Among Parquet files it has an underscore in front, so that readers skip it."""

QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "stage", "reason")])
SAMPLE_SCHEMA = QUARANTINE_SCHEMA.append(pa.field("caption", pa.string())).append(pa.field("thumbnail", pa.binary()))
"""Columns of the files of a unit of work. The last two have values in a few rows only, for the report."""

SAMPLES_PER_REASON, CAPTION_CHARACTERS = 2, 500
_PIECE_SUFFIX = ".rejected.parquet"
_VARIABLE = re.compile(r"'[^']*'|\d+")


class Rejected:
    """Rejected rows of a source, or of one piece of it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._rows: list[dict[str, Any]] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(
        self,
        row: str,
        stage: str,
        reason: str,
        caption: str | None = None,
        image: bytes = b"",
        source: str | None = None,
    ) -> None:
        """Record that a stage rejected the row with this id.

        Args:
            row: its id.
            stage: stage of the job.
            reason: why.
            caption: its caption, and
            image: its image, as far as they are known, for samples in the report.
            source: where it comes from, if not from the `source` of all rows.
        """
        group = (stage, without_values(reason))
        self._counts[group] += 1
        line = {"id": row, "source": source or self.source, "stage": stage, "reason": reason}
        if self._counts[group] <= SAMPLES_PER_REASON and caption is not None:
            line |= {"caption": caption[:CAPTION_CHARACTERS]}
            self._rows.append(_storable(line) | {"thumbnail": thumbnail(image)})
        else:
            self._rows.append(_storable(line))

    def count(self, *stages: str) -> int:
        """Number of rows that these stages rejected."""
        return sum(row["stage"] in stages for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first(self) -> str:
        """`'id': reason` of the first rejected row, for messages; empty if there is none."""
        return f"'{self._rows[0]['id']}': {self._rows[0]['reason']}" if self._rows else ""

    @property
    def grouped(self) -> list[tuple[str, str, int]]:
        """(stage, reason, count); reasons that differ only in numbers and quoted names count as one."""
        return [(stage, reason, count) for (stage, reason), count in self._counts.items()]

    def table(self, schema: pa.Schema = QUARANTINE_SCHEMA) -> pa.Table:
        """The rows in this schema."""
        return pa.Table.from_pylist(self._rows, schema)

    def write(self, path: UPath, schema: pa.Schema = QUARANTINE_SCHEMA) -> None:
        """Write the rows as Parquet."""
        with whole_file(path) as local_path:
            pq.write_table(self.table(schema), local_path)


def without_values(reason: str) -> str:
    """A reason without numbers and quoted names, by which reasons are grouped."""
    return _VARIABLE.sub("…", reason)


def _storable(texts: dict[str, str]) -> dict[str, str]:
    """Texts without halves of surrogate pairs, which no file can store."""
    return {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}


def write_rejected(rejected: Rejected, folder: UPath, number: int) -> None:
    """Write the rejected rows of a unit of work, with samples."""
    rejected.write(folder / f"{number:06d}{_PIECE_SUFFIX}", SAMPLE_SCHEMA)


def rejected_files(folder: UPath) -> list[UPath]:
    """Files written by `write_rejected`, in the order of the units."""
    names = sorted(name.rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False))
    return [folder / name for name in names if name.endswith(_PIECE_SUFFIX)]


def write_quarantine(reasons: dict[str, str], source: str, stage: str, path: UPath) -> None:
    """Write the rows that a `Quarantine` collected; no file if there are none."""
    if reasons:
        rejected = Rejected(source)
        for row, reason in reasons.items():
            rejected.add(row, stage, reason)
        rejected.write(path)


class RejectedLimit:
    """Counts rejected rows, and stops a job that rejects too many."""

    def __init__(self, rows: int | None, max_rejected_fraction: float) -> None:
        """
        Args:
            rows: rows of the whole job; None if that is not known in advance.
            max_rejected_fraction: largest share of them that may be rejected.
        """
        self.rows, self.limit = rows, max_rejected_fraction
        self.seen, self.rejected = 0, 0
        self.example = ""

    def add(self, result: dict[str, Any]) -> None:
        """Count `rows_in` and `rejected` rows, of which one is `first_rejected`.

        Raises:
            DataError: the final share must be too large.
        """
        self.seen += result["rows_in"]
        self.rejected += result["rejected"]
        self.example = self.example or result.get("first_rejected", "")
        if self.rows is not None:
            self.check()

    def check(self) -> None:
        """Raise `DataError` if the share of all rows, or of those seen if the total is unknown, is too large."""
        rows = max(self.rows or 0, self.seen)
        if self.rejected > self.limit * rows:
            raise DataError(
                f"{self.rejected} of {rows} rows rejected, more than max_rejected_fraction={self.limit} allows; the"
                f" first is {self.example}; fix the data, or raise the limit, and run again"
            )


class Quarantine:
    """Collects the rejected rows of a job, once each, even if a retry reports them twice."""

    def __init__(self, rows: int, max_rejected_fraction: float) -> None:
        self._limit = RejectedLimit(rows, max_rejected_fraction)
        self._reasons: dict[str, str] = {}

    def add(self, reasons: dict[str, str]) -> None:
        """Record `{id: reason}`; raises `DataError` if more rows are rejected than allowed."""
        added = reasons.keys() - self._reasons.keys()
        self._reasons |= reasons
        first = next((f"'{row}': {reason}" for row, reason in self._reasons.items()), "")
        self._limit.add({"rows_in": 0, "rejected": len(added), "first_rejected": first})

    def reasons(self) -> dict[str, str]:
        """All rejected ids with their reasons."""
        return self._reasons


def start_quarantine(rows: int, max_rejected_fraction: float) -> Any:
    """Start a `Quarantine` for a job of this many rows; returns the actor's handle."""
    # On the driver's node: if another node died, it would take the quarantine and so the job with it.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=driver_node)(Quarantine)
    return actor.remote(rows, max_rejected_fraction)
