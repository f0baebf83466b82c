"""A benchmark that is killed after every measurement ends with the same results as one that was left alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longclip.checkpoint import new_model, save_checkpoint
from tests.support.local_ray import own_ray
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.processes import frozen, kill_driver, processes_below
from tests.support.tiny_clip import tiny_config

pytestmark = pytest.mark.slow

ROWS, DEADLINE_SECONDS = 16, 300
MODELS, TASKS = 2, 3
MEASUREMENTS = MODELS * TASKS
LONG = "Picture {row} is here. It has {row} spots. All of them are round. One is red. " + "So it goes on. " * 10


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A benchmark of two models on long captions, short ones, and classes; without its output."""
    folder = tmp_path_factory.mktemp("data")
    columns = {
        "id": [f"row-{row:02d}" for row in range(ROWS)],
        "image": [picture(row) for row in range(ROWS)],
        "caption": [LONG.format(row=row) for row in range(ROWS)],
        "short": [f"Picture {row}." for row in range(ROWS)],
        "label": [("cat", "dog", "frog")[row % 3] for row in range(ROWS)],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        save_checkpoint(new_model(tiny_config()), folder / name, {"origin": "test"})
    tasks = {
        "long": {"input": f"{folder}/rows.parquet", "source": {"caption": "caption"}},
        "short": {"input": f"{folder}/rows.parquet", "text": "short", "source": {"caption": "short"}},
        "animals": {"input": f"{folder}/rows.parquet", "kind": "zero_shot", "source": {"label": "label"}},
    }
    models = {name: f"{folder}/{name}" for name in ("first", "second")}
    settings = [f"tasks={json.dumps(tasks)}", f"models={json.dumps(models)}", "perturbation_draws=2"]
    return [sys.executable, "pipelines/benchmark.py", *(part for text in settings for part in ("--set", text))]


class Benchmark:
    """A benchmark in its own process, on the Ray of the test."""

    def __init__(self, command: list[str], output: Path, address: str) -> None:
        self.output, self.log = output, output.parent / f"{time.monotonic_ns()}.log"
        self.end = time.monotonic() + DEADLINE_SECONDS
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--set", f"output={output}"],
                cwd=ROOT,
                env=os.environ | {"RAY_ADDRESS": address},
                stdout=log,
                stderr=log,
            )

    def measured(self) -> int:
        """Number of finished measurements in the output."""
        return len(list(self.output.glob("measured/*/*")))

    def wait_for(self, count: int) -> None:
        """Return when so many measurements are finished."""
        while self.measured() < count:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < self.end, self.log.read_text()
            time.sleep(0.005)

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it has printed."""
        return self.process.wait(DEADLINE_SECONDS), self.log.read_text()


@pytest.fixture
def address() -> Iterator[str]:
    """A Ray that the benchmarks join, so that a killed one need not start another."""
    import ray

    with own_ray(num_cpus=3):
        yield ray.get_runtime_context().gcs_address


def readable(output: Path) -> int:
    """Number of measurements that the results of an unfinished benchmark hold; all its files are whole."""
    assert not (output / "results.json").exists()
    results = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    measured = sum(len(result["models"]) for result in results.values())
    for result in results.values():
        done = len(result["models"])
        assert result.get("unfinished") == (None if done == MODELS else f"{done} of {MODELS} models")
    for path in output.glob("ranks/*"):
        assert pq.read_table(path).num_rows >= ROWS
    if results:
        assert f"of {MEASUREMENTS} measurements are done" in (output / "report.md").read_text()
        assert f"of {MEASUREMENTS} measurements are done" in (output / "report.html").read_text()
    return measured


def test_a_benchmark_killed_after_each_measurement_has_the_same_results(
    command: list[str], address: str, tmp_path: Path
) -> None:
    output = tmp_path / "bench"
    code, log = Benchmark(command, output, address).ended()
    assert code == 0, log
    undisturbed = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    ranks = {path.name: pq.read_table(path) for path in output.glob("ranks/*")}
    assert {"results.json", "report.md", "report.html", "long.json"} <= undisturbed.keys()
    shutil.rmtree(output)

    for count in range(1, MEASUREMENTS):
        running = Benchmark(command, output, address)
        try:
            running.wait_for(count)
            if count == 1:
                with frozen([pid for pid, name in processes_below(os.getpid()) if "ray::" in name]):
                    code, log = Benchmark(command, output, address).ended()
                    assert code == 2
                    assert f"output='{output}' is being written by another job" in log
                    assert "Traceback" not in log
        finally:
            kill_driver(running.process)
        assert running.measured() == count
        assert readable(output) in (count - 1, count)  # a measurement is written before the results
        made_before = f"benchmark: {count - 1} of {MEASUREMENTS} measurements were made before"
        assert (made_before in running.log.read_text()) is (count > 1)

    code, log = Benchmark(command, output, address).ended()
    assert code == 0, log
    assert log.count("; next is ") == 1
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == undisturbed
    assert {path.name: pq.read_table(path) for path in output.glob("ranks/*")} == ranks
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".log") == ["bench"], "no litter"
    assert not list(output.rglob(".*"))
