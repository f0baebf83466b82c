"""Which measurements a benchmark makes, and what its output holds at any time; the measurements are made up."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longclip.errors import ConfigError, DataError, LongClipError
from longclip.evaluation.metrics import Ranks
from pipelines.common.rejected_rows import QUARANTINE
from pipelines.common.settings import validate
from pipelines.evaluation import benchmarking
from pipelines.evaluation.benchmark_output import RUNNING, claim_output
from pipelines.evaluation.measured import WHOLE, Answers, Measured
from pipelines.evaluation.settings import BenchmarkSettings, MeasureSettings
from pipelines.evaluation.tasks import Task, open_task
from tests.support.pictures import picture

QUERIES = 20


class Job:
    """Makes up a measurement from the names of the task and the model, and writes down which it makes."""

    def __init__(self, settings: MeasureSettings) -> None:
        self.tasks = [open_task(name, task, settings.storage) for name, task in settings.tasks.items()]
        self.made: list[tuple[str, str]] = []
        self.fails_at: tuple[str, str] | None = None
        self.rejected: dict[str, str] = {}

    def model(self, source: str, activation: str | None = None) -> str:
        """A directory."""
        return source

    def measure(self, model: str, task: Task, long_text: bool, draws: int) -> Measured:
        """So many hits as the names have letters."""
        if (task.name, Path(model).name) == self.fails_at:
            raise DataError("it fails")
        self.made.append((task.name, Path(model).name))
        rank = torch.arange(QUERIES) - len(task.name) - len(Path(model).name)
        ranks = Ranks(rank.clamp(min=0), torch.zeros(QUERIES).long(), torch.ones(QUERIES).double(), QUERIES)
        answers = Answers(ranks, tuple(map(str, range(QUERIES))), np.arange(QUERIES))
        return Measured("own data", 248, QUERIES, QUERIES, 0, {WHOLE: {"text_to_image": answers}}, self.rejected)


class Bench:
    """A folder with models and tasks, and benchmarks of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.output = folder, folder / "bench"
        for name in ("one", "three", "seven"):
            (folder / name).mkdir()
            (folder / name / "model.safetensors").write_text(name)
        pq.write_table(pa.table({"image": [picture(0)], "caption": ["x"]}), folder / "rows.parquet")
        self.fails_at: tuple[str, str] | None = None
        self.rejected: dict[str, str] = {}

        @contextmanager
        def measure_job(settings: MeasureSettings, directory: Path, scratch: Path) -> Iterator[Job]:
            self.job = Job(settings)
            self.job.fails_at, self.job.rejected = self.fails_at, self.rejected
            (scratch / "litter").mkdir()
            yield self.job

        monkeypatch.setattr(benchmarking, "measure_job", measure_job)

    def run(self, *models: str, tasks: tuple[str, ...] = ("a", "b"), **settings: Any) -> list[tuple[str, str]]:
        """Run a benchmark of these models; returns what it measured."""
        values = {
            "tasks": {name: {"input": f"{self.folder}/rows.parquet", "text": "short"} for name in tasks},
            "models": {name: f"{self.folder}/{name}" for name in models},
            "output": str(self.output),
        }
        benchmarking.benchmark(validate(BenchmarkSettings, values | settings))
        return self.job.made

    def files(self) -> dict[str, bytes]:
        """Contents of the files for users."""
        paths = (path for path in self.output.rglob("*") if path.is_file() and "measured" not in path.parts)
        return {str(path.relative_to(self.output)): path.read_bytes() for path in paths}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


ALL = [("a", "one"), ("a", "three"), ("b", "one"), ("b", "three")]


def test_a_failed_benchmark_continues_after_the_last_measurement(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run("one", "three") == ALL
    undisturbed = bench.files()
    assert bench.run("one", "three") == []
    assert bench.files() == undisturbed
    for file in bench.output.glob("measured/*/*"):
        file.unlink()

    bench.fails_at = ("b", "three")
    with pytest.raises(DataError, match="it fails"):
        bench.run("one", "three")
    assert not (bench.output / "results.json").exists()
    assert json.loads((bench.output / "b.json").read_text())["unfinished"] == "1 of 2 models"
    assert "unfinished" not in json.loads((bench.output / "a.json").read_text())
    for name in ("report.md", "report.html"):
        assert "Unfinished: 3 of 4 measurements are done" in (bench.output / name).read_text()
    assert "| b | done |  |" in (bench.output / "report.md").read_text()
    assert not (bench.output / RUNNING).exists()

    bench.fails_at = None
    capsys.readouterr()
    assert bench.run("one", "three") == [("b", "three")]
    log = capsys.readouterr().out
    assert "benchmark: 3 of 4 measurements were made before: a (one, three), b (one)" in log
    assert "benchmark: 3 of 4 measurements are done; next is b with three (" in log
    assert bench.files() == undisturbed


def test_a_model_and_a_task_are_added_and_removed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run("one", "three")
    assert bench.run("one", "seven", "three") == [("a", "seven"), ("b", "seven")]
    results = json.loads((bench.output / "results.json").read_text())["results"]
    assert list(results) == ["one", "seven", "three"]
    assert bench.run("seven", tasks=("b", "c")) == [("c", "seven")]
    assert bench.files().keys() == {
        *("results.json", "report.md", "report.html", "b.json", "c.json"),
        *("ranks/b.seven.parquet", "ranks/c.seven.parquet"),
    }
    assert "5 measurements of other tasks or models stay in" in capsys.readouterr().out
    assert bench.run("one", "seven", "three") == []


def test_a_changed_model_is_measured_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run("one", "three")
    (bench.folder / "one" / "model.safetensors").write_text("other")
    bench.fails_at = ("a", "one")
    with pytest.raises(DataError):  # the results of 'three' are written, which has nothing to be compared with yet
        bench.run("one", "three")
    assert json.loads((bench.output / "a.json").read_text())["comparisons"] == []
    bench.fails_at = None
    assert bench.run("one", "three") == [("a", "one"), ("b", "one")]
    assert "a is measured again with one: changed since then: model" in capsys.readouterr().out
    assert json.loads((bench.output / "a.json").read_text())["comparisons"][0]["model"] == "three"


def test_the_base_is_measured_first_and_the_order_is_that_of_the_settings(bench: Bench) -> None:
    assert bench.run("one", "three", base="three", tasks=("a",)) == [("a", "three"), ("a", "one")]
    result = json.loads((bench.output / "a.json").read_text())
    assert list(result["models"]) == ["one", "three"]
    assert [(line["base"], line["model"]) for line in result["comparisons"]] == [("three", "one")]


def test_other_conclusions_need_no_other_measurement(bench: Bench) -> None:
    bench.run("one", "three")
    assert bench.run("one", "three", equal_margin=0.1, base="three") == []
    assert bench.run("one", "three", long_text=False) == ALL
    assert bench.run("one", "three", long_text=False, perturbation_draws=2) == ALL


def test_rejected_rows_are_kept_with_the_measurement(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.rejected = {"x": "image is broken"}
    bench.run("one", max_rejected_fraction=0.5)
    bench.rejected = {}
    assert bench.run("one", max_rejected_fraction=0.5) == []
    assert pq.read_table(bench.output / QUARANTINE)["id"].to_pylist() == ["x"]
    assert bench.run("one") == [("a", "one"), ("b", "one")]
    assert not (bench.output / QUARANTINE).exists()
    assert "changed since then: max_rejected_fraction" in capsys.readouterr().out


def test_a_benchmark_that_measures_nothing_leaves_nothing(bench: Bench) -> None:
    bench.fails_at = ("a", "one")
    with pytest.raises(DataError):
        bench.run("one")
    assert not bench.output.exists()


def test_directories_of_others_are_refused_and_killed_benchmarks_are_not(bench: Bench) -> None:
    (bench.output / "measured").mkdir(parents=True)
    with pytest.raises(ConfigError, match="was not made by this job"):
        bench.run("one")
    (bench.output / RUNNING / "litter").mkdir(parents=True)
    (bench.output / RUNNING / "unfinished").touch()
    assert bench.run("one") == [("a", "one"), ("b", "one")]
    assert not (bench.output / RUNNING).exists()


def test_two_benchmarks_cannot_write_to_one_output(bench: Bench) -> None:
    with claim_output(bench.output), pytest.raises(ConfigError, match="is being written by another job"):
        bench.run("one")
    assert bench.run("one") == [("a", "one"), ("b", "one")]


def test_a_benchmark_that_lost_its_output_writes_no_more(bench: Bench) -> None:
    with claim_output(bench.output) as output:
        output.put_text("report.md", "first")
        (output.scratch / "lease").write_text(json.dumps({"owner": "another"}))
        (output.scratch / "of another").touch()
        with pytest.raises(LongClipError, match="was taken over by another job while this one was suspended"):
            output.put_text("report.md", "second")
    assert (bench.output / "report.md").read_text() == "first"
    assert (bench.output / RUNNING / "of another").exists()
