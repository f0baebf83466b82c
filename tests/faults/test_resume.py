"""Data jobs that are killed, and run again: nothing is lost, doubled or done twice, and nobody sees half an output."""

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

from tests.support.broken_rows import jpeg
from tests.support.places import ROOT
from tests.support.processes import kill_driver, processes_below

pytestmark = pytest.mark.slow

ROWS, ROWS_PER_PIECE = 3000, 50
DEADLINE_SECONDS = 180


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with some that are broken and some that are there twice."""
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


class Job:
    """A data job in a process of its own."""

    def __init__(self, verb: str, source: Path, output: Path) -> None:
        self.output, self.partial = output, output.parent / f".{output.name}.partial"
        piece = "source.rows_per_piece" if verb == "prepare" else "rows_per_piece"
        settings = [f"input={source}", f"output={output}", f"{piece}={ROWS_PER_PIECE}"]
        command = [sys.executable, f"pipelines/{verb}.py", *(part for text in settings for part in ("--set", text))]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.log = output.parent / f"{output.name}.{time.monotonic_ns()}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def wait_for_pieces(self, stage: str, count: int) -> None:
        """Return when so many pieces of a stage are finished, and more are to come."""
        end = time.monotonic() + DEADLINE_SECONDS
        while len(list((self.partial / stage).glob("*.json"))) < count:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """`kill -9` of the driver."""
        kill_driver(self.process)

    def finish(self) -> str:
        """Output of a job that ends well."""
        code = self.process.wait(DEADLINE_SECONDS)
        assert code == 0, self.log.read_text()
        return self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start_job(verb: str, source: Path, name: str = "out") -> Job:
        jobs.append(Job(verb, source, tmp_path / name))
        return jobs[-1]

    yield start_job
    for job in jobs:
        if job.process.poll() is None:
            job.kill()


def contents(output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and rejected rows of an output, in its order."""
    rows = [row for file in sorted(output.rglob("[!_]*.parquet")) for row in pq.read_table(file).to_pylist()]
    return rows, pq.read_table(output / "_quarantine.parquet").to_pylist()


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of jobs that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outputs = {"prepare": folder / "clean", "summarize": folder / "summarized"}
    Job("prepare", source, outputs["prepare"]).finish()
    Job("summarize", outputs["prepare"], outputs["summarize"]).finish()
    rows, rejected = contents(outputs["prepare"])
    assert (len(rows), len(rejected)) == (ROWS - 60, 60)
    assert len(contents(outputs["summarize"])[0]) == ROWS - 60
    return outputs


def done_before(log: str, stage: str) -> int:
    found = re.search(rf"(\d+) of \d+ pieces of '{stage}' are already finished", log)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("verb", "stage", "pieces"), [("prepare", "clean", (5, 30)), ("summarize", "summarize", (4, 12))]
)
def test_a_driver_that_is_killed_twice(
    start: Callable[..., Job],
    source: Path,
    undisturbed: dict[str, Path],
    verb: str,
    stage: str,
    pieces: tuple[int, int],
) -> None:
    data = source if verb == "prepare" else undisturbed["prepare"]
    for count in pieces:
        job = start(verb, data)
        job.wait_for_pieces(stage, count)
        job.kill()
        assert not job.output.exists()
    finished = len(list((job.partial / stage).glob("*.json")))
    job = start(verb, data)
    assert done_before(job.finish(), stage) == finished
    assert contents(job.output) == contents(undisturbed[verb])
    assert not job.partial.exists()


def test_a_driver_that_is_killed_while_the_files_are_written(
    start: Callable[..., Job], source: Path, undisturbed: dict[str, Path]
) -> None:
    job = start("prepare", source)
    job.wait_for_pieces("write", 1)
    job.kill()
    log = start("prepare", source).finish()
    assert done_before(log, "clean") == ROWS // ROWS_PER_PIECE
    assert contents(job.output) == contents(undisturbed["prepare"])


@pytest.mark.parametrize(("verb", "stage"), [("prepare", "clean"), ("summarize", "summarize")])
def test_a_worker_that_is_killed(
    start: Callable[..., Job], source: Path, undisturbed: dict[str, Path], verb: str, stage: str
) -> None:
    job = start(verb, source if verb == "prepare" else undisturbed["prepare"])
    job.wait_for_pieces(stage, 2)
    workers = [pid for pid, name in processes_below(job.process.pid) if "RunUnits" in name]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    job.finish()
    assert contents(job.output) == contents(undisturbed[verb])


def test_the_second_of_two_jobs_on_one_output_refuses(
    start: Callable[..., Job], source: Path, undisturbed: dict[str, Path]
) -> None:
    first = start("prepare", source)
    first.wait_for_pieces("clean", 1)
    second = start("prepare", source)
    assert second.process.wait(DEADLINE_SECONDS) == 2
    assert "is being written by another job" in second.log.read_text()
    assert "Traceback" not in second.log.read_text()
    first.finish()
    assert contents(first.output) == contents(undisturbed["prepare"])
