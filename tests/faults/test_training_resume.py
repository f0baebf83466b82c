"""Training that is broken off at any step and goes on: its result is that of a run that nobody disturbed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.cluster_utils import Cluster

from longclip.checkpoint import load_checkpoint, new_model, save_checkpoint
from longclip.encode import encode_text, unit
from longclip.tokenizer import tokenize
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.processes import kill_driver, processes_below
from tests.support.tiny_clip import tiny_config
from tests.support.trained import assert_equal_weights

pytestmark = pytest.mark.slow

ROWS, GLOBAL_BATCH, EPOCHS, EVERY = 100, 16, 15, 10
STEPS = ROWS // GLOBAL_BATCH * EPOCHS
BROKEN = 3
DEADLINE_SECONDS = 900


class Training:
    """A run of finetune.py in a process of its own."""

    def __init__(
        self, folder: Path, output: str, workers: int = 2, address: str | None = None, more: Sequence[str] = ()
    ) -> None:
        self.output = folder / output
        settings = [
            f"input={folder / 'rows.parquet'}",
            f"validation.input={folder / 'rows.parquet'}",
            f"model.base={folder / 'base'}",
            f"output={self.output}",
            f"optim.per_worker_batch_size={GLOBAL_BATCH // workers}",
            f"workers.count={workers}",
            f"optim.epochs={EPOCHS}",
            f"checkpoints.every_steps={EVERY}",
            *("data.streams=2", "data.shuffle_window=24", "data.max_rejected_fraction=0.1", "validation.rows=40"),
            *("optim.learning_rate=1e-3", "optim.warmup_steps=5", "optim.ema_decay=0.9", "optim.chunk_size=8"),
            *("loss.pca_dim=4", "log_every_steps=5"),
            *more,
        ]
        command = [sys.executable, "pipelines/finetune.py", *(part for text in settings for part in ("--set", text))]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        self.log = folder / f"{output}.{time.monotonic_ns()}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def wait_for_step(self, step: int) -> None:
        """Return when the checkpoint of a step is there."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not (self.output / ".run" / f"step_{step:07d}").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def kill_worker(self) -> None:
        """`kill -9` of one of two workers."""
        workers = [pid for pid, name in processes_below(self.process.pid) if "RayTrainWorker" in name]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)

    def finish(self) -> str:
        """Output of a run that ends well."""
        code = self.process.wait(DEADLINE_SECONDS)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def steps(self) -> list[int]:
        """Steps that were reported."""
        return [int(step) for step in re.findall(rf"step (\d+)/{STEPS}: loss", self.log.read_text())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, one of them broken, and an untrained base."""
    path = tmp_path_factory.mktemp("training")
    rows = [
        {
            "id": f"row-{row:03d}",
            "image": b"broken" if row == BROKEN else picture(row),
            "caption": f"A first sentence. Picture number {row} is here. It has many dots.",
            "summary": [f"picture {row}", f"number {row}"],
        }
        for row in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet", row_group_size=16)
    torch.manual_seed(0)
    save_checkpoint(new_model(tiny_config(context_length=77)), path / "base", {"origin": "test"})
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """Output of a run that nobody disturbed."""
    training = Training(folder, "undisturbed")
    log = training.finish()
    assert training.steps() == [*range(5, STEPS + 1, 5)]
    assert f"{STEPS * GLOBAL_BATCH} pairs seen, 96 of {ROWS} rows a pass" in log
    return training.output


@pytest.fixture
def trainings() -> Iterator[list[Training]]:
    started: list[Training] = []
    yield started
    for training in started:
        if training.process.poll() is None:
            kill_driver(training.process)


def assert_equal_result(output: Path, expected: Path) -> None:
    """The same weights and the same rejected rows."""
    assert_equal_weights(output, expected)
    quarantines = [pq.read_table(path / "quarantine.parquet").to_pylist() for path in (output, expected)]
    assert quarantines[0] == quarantines[1]
    assert [row["id"] for row in quarantines[0]] == [f"row-{BROKEN:03d}"]


def assert_same_features(output: Path, expected: Path, averaged: bool = True) -> None:
    """Rounding differs with the number of workers, and Adam makes much of it where a gradient is nothing but rounding:
    what the models compute is compared, not their weights."""
    texts = [f"Picture number {row} is here. It has many dots." for row in range(30)]
    features = []
    for path in (output, expected):
        checkpoint = load_checkpoint(path / "checkpoint")
        if not averaged:
            state = torch.load(path / ".run" / f"step_{STEPS:07d}" / "training_state.pt", weights_only=True)
            checkpoint.model.load_state_dict(state["model"])
        with torch.no_grad():
            features.append(unit(encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, texts))))
    assert torch.allclose(features[0], features[1], atol=1e-4)


def test_a_driver_that_is_killed_twice(folder: Path, undisturbed: Path, trainings: list[Training]) -> None:
    for step in (EVERY, 5 * EVERY):
        trainings.append(Training(folder, "driver"))
        trainings[-1].wait_for_step(step)
        kill_driver(trainings[-1].process)
        assert not (trainings[-1].output / "checkpoint").exists()
    trainings.append(Training(folder, "driver"))
    trainings[-1].finish()
    assert trainings[-1].steps()[0] > 4 * EVERY, "only steps since the last registered checkpoint are done again"
    assert_equal_result(trainings[-1].output, undisturbed)


def test_a_worker_that_is_killed(folder: Path, undisturbed: Path, trainings: list[Training]) -> None:
    trainings.append(Training(folder, "worker"))
    trainings[0].wait_for_step(EVERY)
    trainings[0].kill_worker()
    trainings[0].finish()
    assert max(trainings[0].steps()) == STEPS
    assert_equal_result(trainings[0].output, undisturbed)


def test_another_number_of_workers(folder: Path, undisturbed: Path, trainings: list[Training]) -> None:
    trainings.append(Training(folder, "fewer"))
    trainings[0].wait_for_step(EVERY)
    kill_driver(trainings[0].process)
    trainings.append(Training(folder, "fewer", workers=1))
    trainings[1].finish()
    assert_same_features(trainings[1].output, undisturbed)


def test_a_machine_that_is_lost(folder: Path, undisturbed: Path, trainings: list[Training]) -> None:
    """A run on two nodes goes on with one worker where it may, with the same global batches."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        lost = cluster.add_node(num_cpus=3)
        trainings.append(
            Training(folder, "machine", address=cluster.address, more=["workers.cpus=2", "workers.min_count=1"])
        )
        trainings[0].wait_for_step(EVERY)
        cluster.remove_node(lost, allow_graceful=False)
        trainings[0].finish()
    finally:
        cluster.shutdown()
    assert max(trainings[0].steps()) == STEPS
    assert_same_features(trainings[0].output, undisturbed)


def test_towers_that_are_shared_out_and_a_worker_that_is_killed(
    folder: Path, undisturbed: Path, trainings: list[Training]
) -> None:
    trainings.append(Training(folder, "sharded", more=["workers.strategy=fsdp", "optim.ema_decay=null"]))
    trainings[0].wait_for_step(EVERY)
    trainings[0].kill_worker()
    trainings[0].finish()
    assert_same_features(trainings[0].output, undisturbed, averaged=False)
    loaded = load_checkpoint(trainings[0].output / "checkpoint").model.state_dict()
    state = torch.load(trainings[0].output / ".run" / f"step_{STEPS:07d}" / "training_state.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in state["model"].items())
