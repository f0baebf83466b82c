"""Killed data jobs resume without losing, duplicating or repeating rows; readers never see an incomplete output.

Each process start costs more than the work itself, so one run takes several faults.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prepare, summarize
from tests.support.broken_rows import jpeg
from tests.support.local_ray import own_ray
from tests.support.places import ROOT
from tests.support.processes import frozen, kill_driver, processes_below

pytestmark = pytest.mark.slow

ROWS, ROWS_PER_PIECE = 1000, 20
PIECES = ROWS // ROWS_PER_PIECE
UNUSABLE = 2 * (ROWS // 100)
DEADLINE_SECONDS = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, some of them broken or duplicates."""
    rows = [
        {"id": f"row-{row:05d}", "image": jpeg(row), "caption": f"Picture {row} is here. It has spots. All are round."}
        for row in range(ROWS)
    ]
    for row in range(0, ROWS, 100):
        rows[row]["image"] = b"broken"
    for row in range(50, ROWS, 100):
        rows[row]["image"] = rows[row - 49]["image"]
    path = tmp_path_factory.mktemp("source") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_PER_PIECE)
    return path


def settings(verb: str, source: Path, output: Path) -> list[str]:
    """Arguments of a data job; prepare writes several files."""
    sizes = [f"source.rows_per_piece={ROWS_PER_PIECE}", "file_megabytes=1"]
    values = [f"input={source}", f"output={output}"]
    values += sizes if verb == "prepare" else [f"rows_per_piece={ROWS_PER_PIECE}"]
    return [part for text in values for part in ("--set", text)]


class Job:
    """A data job in its own process."""

    def __init__(self, verb: str, source: Path, output: Path) -> None:
        self.output, self.partial = output, output.parent / f".{output.name}.partial"
        self.end = time.monotonic() + DEADLINE_SECONDS
        command = [sys.executable, f"pipelines/{verb}.py", *settings(verb, source, output)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.log = output.parent / f"{output.name}.{time.monotonic_ns()}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def finished_pieces(self, stage: str) -> int:
        """Number of finished pieces of a stage."""
        return len(list((self.partial / stage).glob("*.json")))

    def wait_for_pieces(self, stage: str, count: int) -> None:
        """Return when `count` pieces of a stage are finished."""
        while self.finished_pieces(stage) < count:
            self._wait()

    def workers(self, name: str) -> list[int]:
        """Process ids of its workers with `name` in their title; waits for the first one."""
        while not (pids := [pid for pid, line in processes_below(self.process.pid) if name in line]):
            self._wait()
        return pids

    def kill(self) -> None:
        """`kill -9` of the driver, before there is an output."""
        kill_driver(self.process)
        assert not self.output.exists()

    def kill_worker(self) -> None:
        """`kill -9` of a worker process."""
        os.kill(self.workers("RunUnits")[0], signal.SIGKILL)

    def finish(self) -> str:
        """Wait for success; returns the log."""
        code = self.process.wait(DEADLINE_SECONDS)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def _wait(self) -> None:
        assert self.process.poll() is None, self.log.read_text()
        assert time.monotonic() < self.end, self.log.read_text()
        time.sleep(0.005)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start_job(verb: str, source: Path, name: str = "out") -> Job:
        jobs.append(Job(verb, source, tmp_path / name))
        return jobs[-1]

    yield start_job
    for job in jobs:
        if job.process.poll() is None:
            kill_driver(job.process)


def contents(output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and rejected rows of an output, in order."""
    rows = [row for file in sorted(output.rglob("[!_]*.parquet")) for row in pq.read_table(file).to_pylist()]
    return rows, pq.read_table(output / "_quarantine.parquet").to_pylist()


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of uninterrupted jobs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outputs = {"prepare": folder / "clean", "summarize": folder / "summarized"}
    with own_ray(num_cpus=2):
        prepare.main(settings("prepare", source, outputs["prepare"]))
        summarize.main(settings("summarize", source, outputs["summarize"]))
    rows, rejected = contents(outputs["prepare"])
    assert (len(rows), len(rejected)) == (ROWS - UNUSABLE, UNUSABLE)
    assert len(contents(outputs["summarize"])[0]) == ROWS
    return outputs


def done_before(log: str, stage: str) -> int:
    match = re.search(rf"(\d+) of \d+ pieces of '{stage}' are already finished", log)
    return int(match[1]) if match else 0


def test_prepare_resumes_after_kills_in_both_stages(
    start: Callable[..., Job], source: Path, undisturbed: dict[str, Path]
) -> None:
    """The driver is killed in both stages, a worker is killed, and a second job on the same output is rejected."""
    first = start("prepare", source)
    first.wait_for_pieces("clean", 4)
    with frozen(first.workers("ray::")):  # so that it does not finish while the second one starts
        second = start("prepare", source)
        assert second.process.wait(DEADLINE_SECONDS) == 2
        assert "is being written by another job" in second.log.read_text()
        assert "Traceback" not in second.log.read_text()
        first.kill()
    finished = first.finished_pieces("clean")

    third = start("prepare", source)
    third.wait_for_pieces("clean", finished + 4)
    third.kill_worker()
    third.wait_for_pieces("write", 1)
    third.kill()
    assert done_before(third.log.read_text(), "clean") == finished

    last = start("prepare", source)
    assert done_before(last.finish(), "clean") == PIECES, "another worker did the piece of the killed one"
    assert contents(last.output) == contents(undisturbed["prepare"])
    assert not last.partial.exists()


def test_summarize_resumes_after_kills_of_driver_and_worker(
    start: Callable[..., Job], source: Path, undisturbed: dict[str, Path]
) -> None:
    finished = 0
    for _ in range(2):
        job = start("summarize", source)
        job.wait_for_pieces("summarize", finished + 4)
        job.kill()
        assert done_before(job.log.read_text(), "summarize") == finished
        finished = job.finished_pieces("summarize")
    job = start("summarize", source)
    job.wait_for_pieces("summarize", finished + 2)
    job.kill_worker()
    assert done_before(job.finish(), "summarize") == finished
    assert contents(job.output) == contents(undisturbed["summarize"])
    assert not job.partial.exists()
