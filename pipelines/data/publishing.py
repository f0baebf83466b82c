"""The last step of a data job: quarantine file, report, manifest, publication of the output."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.files import file_sha256
from pipelines.common.parquet_set import parquet_writer
from pipelines.common.rejected_rows import QUARANTINE, QUARANTINE_SCHEMA, Rejected, rejected_files
from pipelines.common.settings import Settings, dump
from pipelines.common.storage import arrow_filesystem
from pipelines.common.whole_files import whole_file, write_whole
from pipelines.data.histograms import Histogram
from pipelines.data.report import RejectedSamples, Sample, render_report
from pipelines.data.workspace import Workspace

SCHEMA_VERSION = 1
REPORT = "_report.html"
SAMPLES = 24


@dataclass(frozen=True)
class Finished:
    """Description of a finished output, for its report and manifest."""

    title: str
    source: str
    settings: Settings
    facts: list[tuple[str, str]]
    """(name, value) lines of the report, in addition to the counts."""
    counts: dict[str, int]
    """`rows_in`, `rows_out`, `rejected` and others."""
    files: list[dict[str, Any]]
    """`name`, `rows`, `bytes`, `sha256` of each data file."""
    schema: pa.Schema
    reasons: Sequence[tuple[str, str, int]]
    """(stage, reason, count) of rejected rows."""
    histograms: Sequence[Histogram]
    stage: str
    """Stage whose units wrote files of rejected rows."""
    sample: Callable[[dict[str, Any]], Sample]
    """Converts an output row to a sample for the report."""
    rejected: Rejected | None = None
    """Additional rejected rows."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further values of the manifest."""


def finish(work: Workspace, finished: Finished) -> dict[str, Any]:
    """Complete the output in the workspace and publish it; returns the manifest."""
    rejected_samples = RejectedSamples()
    with whole_file(work.tree / f"_{QUARANTINE}") as local:
        with parquet_writer(local, QUARANTINE_SCHEMA) as groups:
            for path in rejected_files(work.folder(finished.stage)):
                rows = pq.read_table(path.path, filesystem=arrow_filesystem(path))
                rejected_samples.add(rows)
                groups.add(rows.select(QUARANTINE_SCHEMA.names))
            if finished.rejected:
                groups.add(finished.rejected.table())
        quarantine = {"name": f"_{QUARANTINE}", "rows": groups.rows, "sha256": file_sha256(local)}
    splits = Counter[str]()
    for file in finished.files:
        splits[file["name"].rpartition("/")[0]] += file["rows"]
    facts = [*finished.facts, *((name.replace("_", " "), f"{count:,}") for name, count in finished.counts.items())]
    facts += [(f"rows of {split}", f"{rows:,}") for split, rows in splits.items() if split]
    facts += [("files", f"{len(finished.files):,}, {sum(file['bytes'] for file in finished.files) / 1e6:,.1f} MB")]
    reasons = add_counts({(stage, reason): count} for stage, reason, count in finished.reasons)
    report = render_report(
        title=finished.title,
        facts=facts,
        rejected=[(stage, reason, count) for (stage, reason), count in reasons.items()],
        histograms=finished.histograms,
        samples=_samples(work.tree, finished),
        rejected_samples=rejected_samples.chosen,
        settings=dump(finished.settings),
    )
    write_whole(work.tree / REPORT, report.encode())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": finished.source,
        "counts": finished.counts,
        **finished.details,
        "splits": {split: rows for split, rows in splits.items() if split},
        **_statistics(finished.histograms),
        "columns": {field.name: str(field.type) for field in finished.schema},
        "files": finished.files,
        "quarantine": quarantine,
        "settings": dump(finished.settings),
    }
    work.publish(manifest)
    return manifest


def add_counts(counts: Iterable[dict[Any, int]]) -> Counter[Any]:
    """Sum of counters that went through JSON: keys that are digits become numbers again."""
    total: Counter[Any] = Counter()
    for part in counts:
        total.update({int(key) if isinstance(key, str) and key.isdigit() else key: part[key] for key in part})
    return total


def _statistics(histograms: Sequence[Histogram]) -> dict[str, dict[str, Any]]:
    by_kind: dict[str, dict[str, Any]] = {}
    for histogram in histograms:
        by_kind.setdefault(histogram.kind, {})[histogram.title] = histogram.summary()
    return by_kind


def _samples(tree: UPath, finished: Finished) -> list[Sample]:
    """Some rows, spread evenly over the output."""
    ends = np.cumsum([file["rows"] for file in finished.files])
    samples = []
    for position in np.unique(np.linspace(0, ends[-1] - 1, SAMPLES).astype(int)).tolist():
        index = int(np.searchsorted(ends, position, side="right"))
        row = _read_row(tree / finished.files[index]["name"], position - int(ends[index - 1] if index else 0))
        samples.append(finished.sample(row))
    return samples


def _read_row(path: UPath, row: int) -> dict[str, Any]:
    with pq.ParquetFile(path.path, filesystem=arrow_filesystem(path)) as file:
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return file.read_row_group(group).slice(row, 1).to_pylist()[0]
            row -= rows
    raise IndexError(f"{path} has fewer rows than its manifest says")
