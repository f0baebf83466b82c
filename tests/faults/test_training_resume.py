"""Training that is interrupted and resumed has the same result as an uninterrupted run.

Each process start costs more than the training itself, so a run is short, and one run takes several faults.
"""

import os
import re
import shutil
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
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from longclip.checkpoint import load_checkpoint, new_model, save_checkpoint
from longclip.encode import encode_text, unit
from longclip.lineage import read_lineage
from longclip.tokenizer import tokenize
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.processes import frozen, kill_driver, processes_below
from tests.support.tiny_clip import tiny_config
from tests.support.trained import assert_equal_weights, registered_step

pytestmark = pytest.mark.slow

ROWS, GLOBAL_BATCH, EPOCHS, EVERY = 100, 16, 3, 3
STEPS = ROWS // GLOBAL_BATCH * EPOCHS
BROKEN = 3
DEADLINE_SECONDS = 600
REPORT_SECONDS = 0.25
"""Ray Train takes one report per worker and period. With a report per step, no run ends within 2 s of its first
checkpoint, so a test can interrupt it. Ray's default of 2 s would make each run last half a minute."""

DEAD_AFTER_10_SECONDS = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
"""Time until Ray declares a node dead. Until then, Ray Train waits for it, up to a minute at a time."""


class Training:
    """A run of finetune.py in its own process."""

    def __init__(
        self, folder: Path, output: str, workers: int = 2, address: str | None = None, more: Sequence[str] = ()
    ) -> None:
        self.output, self.end = folder / output, time.monotonic() + DEADLINE_SECONDS
        settings = [
            f"input={folder / 'rows.parquet'}",
            f"validation.input={folder / 'rows.parquet'}",
            f"model.base={folder / 'base'}",
            f"output={self.output}",
            f"optim.per_worker_batch_size={GLOBAL_BATCH // workers}",
            f"workers.count={workers}",
            f"optim.epochs={EPOCHS}",
            f"checkpoints.every_steps={EVERY}",
            *("data.streams=2", "data.shuffle_window=24", "max_rejected_fraction=0.1", "validation.rows=40"),
            *("optim.learning_rate=1e-3", "optim.warmup_steps=5", "optim.ema_decay=0.9", "optim.chunk_size=8"),
            *("loss.pca_dim=4", "log_every_steps=1"),
            *more,
        ]
        command = [sys.executable, "pipelines/finetune.py", *(part for text in settings for part in ("--set", text))]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(REPORT_SECONDS)
        self.log = folder / f"{output}.{time.monotonic_ns()}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.raylets_below = os.getpid() if address else self.process.pid

    def wait_for_workers(self) -> list[int]:
        """Process ids of its two workers, which have not begun to train."""
        workers: list[int] = []
        while len(workers) < 2:
            self._wait(0.2)
            workers = [pid for pid, name in processes_below(self.raylets_below) if "RayTrainWorker" in name]
        return workers

    def wait_for_checkpoint(self, step: int) -> None:
        """Return when a resume would start at this step, or a later one."""
        while registered_step(self.output) < step:
            self._wait(0.005)

    def kill_driver(self) -> None:
        """`kill -9` of the driver, before the run has a result."""
        kill_driver(self.process)
        assert not (self.output / "checkpoint").exists()

    def _wait(self, seconds: float) -> None:
        assert self.process.poll() is None, self.log.read_text()
        assert time.monotonic() < self.end, self.log.read_text()
        time.sleep(seconds)

    def finish(self) -> str:
        """Wait for success; returns the log."""
        code = self.process.wait(DEADLINE_SECONDS)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def steps(self) -> list[int]:
        """Reported steps."""
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
    """Output of an uninterrupted run."""
    training = Training(folder, "undisturbed")
    log = training.finish()
    assert training.steps() == [*range(1, STEPS + 1)]
    assert f"{STEPS * GLOBAL_BATCH} pairs seen, 96 of {ROWS} rows per epoch" in log
    return training.output


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> Path:
    """Output of a run of two workers whose driver was killed."""
    training = Training(folder, "interrupted")
    try:
        training.wait_for_checkpoint(EVERY)
    finally:
        training.kill_driver()
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
    """Compare features instead of weights: rounding differs with the number of workers, and Adam amplifies it where a
    gradient is close to zero."""
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


def test_resume_after_the_driver_is_killed_twice_and_a_worker_once(
    folder: Path, undisturbed: Path, interrupted: Path, trainings: list[Training]
) -> None:
    shutil.copytree(interrupted, folder / "killed")
    for victim in ("driver", "worker"):
        resumed_from = registered_step(folder / "killed")
        assert resumed_from
        training = Training(folder, "killed")
        trainings.append(training)
        workers = training.wait_for_workers()
        training.wait_for_checkpoint(resumed_from + EVERY)
        if victim == "driver":
            training.kill_driver()
        else:
            os.kill(workers[1], signal.SIGKILL)
            training.finish()
        assert training.steps()[0] == resumed_from + 1, "only steps since the last registered checkpoint are repeated"
    assert max(training.steps()) == STEPS
    assert_equal_result(training.output, undisturbed)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("longclip").experiment_id
    (run,) = client.search_runs([experiment], filter_string="run_name = 'killed'")
    assert (run.info.run_id, run.info.status) == (read_lineage(training.output / "checkpoint").run_id, "FINISHED")
    (other,) = client.search_runs([experiment], filter_string="run_name = 'interrupted'")
    assert other.info.status == "RUNNING", "the copy of an output does not continue the run of the original"


def test_resume_with_fewer_workers(
    folder: Path, undisturbed: Path, interrupted: Path, trainings: list[Training]
) -> None:
    shutil.copytree(interrupted, folder / "fewer")
    resumed_from = registered_step(folder / "fewer")
    trainings.append(Training(folder, "fewer", workers=1))
    trainings[0].finish()
    assert trainings[0].steps() == [*range(resumed_from + 1, STEPS + 1)]
    assert_same_features(trainings[0].output, undisturbed)


def test_one_worker_continues_after_a_machine_is_lost(
    folder: Path, undisturbed: Path, trainings: list[Training]
) -> None:
    """A run on two nodes may continue with one worker, with the same global batches."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "_system_config": DEAD_AFTER_10_SECONDS})
    try:
        lost = cluster.add_node(num_cpus=3)
        trainings.append(
            Training(folder, "machine", address=cluster.address, more=["workers.cpus=2", "workers.min_count=1"])
        )
        workers = trainings[0].wait_for_workers()
        trainings[0].wait_for_checkpoint(EVERY)
        with frozen(workers):  # removing a node takes a while
            cluster.remove_node(lost, allow_graceful=False)
        trainings[0].finish()
    finally:
        cluster.shutdown()
    assert max(trainings[0].steps()) == STEPS
    assert_same_features(trainings[0].output, undisturbed)


def test_sharded_training_resumes_after_a_worker_is_killed(
    folder: Path, undisturbed: Path, trainings: list[Training]
) -> None:
    training = Training(folder, "sharded", more=["workers.strategy=fsdp", "optim.ema_decay=null"])
    trainings.append(training)
    workers = training.wait_for_workers()
    training.wait_for_checkpoint(EVERY)
    os.kill(workers[1], signal.SIGKILL)
    training.finish()
    assert_same_features(training.output, undisturbed, averaged=False)
    loaded = load_checkpoint(training.output / "checkpoint").model.state_dict()
    state = torch.load(training.output / ".run" / f"step_{STEPS:07d}" / "training_state.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in state["model"].items())
