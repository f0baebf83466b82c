"""Rows in and out: names of columns, and rows that were rejected."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from longclip.errors import DataError
from pipelines.common.settings import Settings


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


QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "stage", "reason")])
_VARIABLE = re.compile(r"'[^']*'|\d+")


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
    # Beside the driver: elsewhere it would be lost with its machine, and the job with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Quarantine)
    return actor.remote(rows, max_rejected_fraction)


def write_quarantine(reasons: dict[str, str], source: str, stage: str, path: Path) -> None:
    """Write rejected rows as a Parquet `id, source, stage, reason`; nothing where there are none."""
    if reasons:
        rows = [{"id": row, "source": source, "stage": stage, "reason": reason} for row, reason in reasons.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, QUARANTINE_SCHEMA), path)


class Rejected:
    """Rejected rows of one piece of a source."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._rows: list[dict[str, str]] = []

    def add(self, row: str, stage: str, reason: str) -> None:
        """Note that a row was rejected."""
        row = row.encode(errors="replace").decode()
        self._rows.append({"id": row, "source": self.source, "stage": stage, "reason": reason})

    def count(self, *stages: str) -> int:
        """Rows rejected in some stages."""
        return sum(row["stage"] in stages for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first(self) -> str:
        """The first rejected row and its reason, for messages; empty where there is none."""
        return f"'{self._rows[0]['id']}': {self._rows[0]['reason']}" if self._rows else ""

    @property
    def grouped(self) -> list[tuple[str, str, int]]:
        """(stage, reason, count): reasons that differ only in numbers and names are one."""
        counts = Counter((row["stage"], _VARIABLE.sub("…", row["reason"])) for row in self._rows)
        return [(stage, reason, count) for (stage, reason), count in counts.items()]

    def table(self) -> pa.Table:
        """Rows of a quarantine Parquet."""
        return pa.Table.from_pylist(self._rows, QUARANTINE_SCHEMA)
