"""The jobs on data, without Ray: their units of work run one after the other in the process of the test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.common.entry import run_entry
from pipelines.common.progress import Progress
from pipelines.data import decontamination, preparation
from pipelines.data.scores import scoring
from pipelines.data.summaries import summarization
from pipelines.data.workspace import Workspace


def run_units(
    work: Workspace,
    stage: str,
    units: Sequence[dict[str, Any]],
    task: Callable[[int, dict[str, Any]], dict[str, Any]],
    progress: Progress,
    workers: Any = None,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """Like `pipelines.data.work_units.run_units`; the last unit is done first, as may happen in a cluster."""
    work.folder(stage)
    results = {}
    for number in reversed(range(len(units))):
        results[number] = json.loads(json.dumps(task(number, json.loads(json.dumps(units[number])))))
        on_result(results[number])
    return [results[number] for number in range(len(units))]


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Let `prepare`, `summarize` and `score` work in this process."""
    for module in (preparation, decontamination, summarization, scoring):
        patch.setattr(module, "run_units", run_units)
    for module in (preparation, summarization, scoring):
        patch.setattr(module, "connect", lambda *_, **__: None)


def run_job(main: Callable[[Sequence[str]], None], *settings: str) -> int:
    """Run a job with `--set` for each setting; returns its exit code."""
    with pytest.raises(SystemExit) as left:
        run_entry(lambda: main([part for setting in settings for part in ("--set", setting)]))
    return int(left.value.code or 0)


def output_rows(output: Path) -> list[dict[str, Any]]:
    """Rows of an output, in the order of its files."""
    return [row for file in sorted(output.rglob("[!_]*.parquet")) for row in pq.read_table(file).to_pylist()]


def quarantined(output: Path) -> list[dict[str, Any]]:
    """Rows that an output left out."""
    return pq.read_table(output / "_quarantine.parquet").to_pylist()


def manifest(output: Path) -> dict[str, Any]:
    """Manifest of an output."""
    return json.loads((output / "_manifest.json").read_text())
