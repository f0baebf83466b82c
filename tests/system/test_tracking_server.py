"""The registry of a team: MLflow on PostgreSQL with artifacts in S3, all of them real; and MLflow that is down."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from upath import UPath

from longclip.checkpoint import checkpoint_id, new_model, save_checkpoint
from longclip.errors import CheckpointError, ConfigError, PromotionError
from longclip.lineage import Lineage
from pipelines import finetune, register
from pipelines.registry.cards import add_to_card
from pipelines.registry.runs import end_run, start_run
from pipelines.registry.versions import alias_version, download_checkpoint, move_alias, replaced_version
from pipelines.training.callbacks import MetricsToMlflow
from serving.model_source import open_model
from tests.support.programs import needs_programs
from tests.support.rows import write_rows
from tests.support.s3_server import KEY, SECRET, S3Server
from tests.support.tiny_clip import tiny_config
from tests.support.tracking_server import BUCKET, MlflowServer, Postgres

pytestmark = [pytest.mark.slow, needs_programs("initdb", "postgres", packages="postgresql")]


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> UPath:
    """Where the server puts artifacts."""
    path = UPath(f"s3://{BUCKET}", key=KEY, secret=SECRET, endpoint_url=s3_server.url, use_listings_cache=False)
    path.fs.makedirs(BUCKET, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, bucket: UPath) -> Iterator[MlflowServer]:
    directory = tmp_path_factory.mktemp("tracking")
    postgres = Postgres(directory)
    postgres.start()
    server = MlflowServer(directory, postgres, s3_server)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        mlflow.set_tracking_uri(None)  # this also unsets the environment variable, if an earlier test set a URI
        patch.setenv("MLFLOW_TRACKING_URI", server.url)
        yield server
    mlflow.set_tracking_uri(None)
    server.stop()
    postgres.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of other weights."""
    directories = [tmp_path_factory.mktemp("model") / "checkpoint" for _ in range(2)]
    for directory in directories:
        save_checkpoint(new_model(tiny_config()), directory, {"origin": "test"})
    return directories


def registered(directory: Path, alias: str) -> None:
    register.main(["--set", f"checkpoint={directory}", "--set", f"alias={alias}"])


def test_versions_live_in_the_database_and_their_files_in_s3(
    server: MlflowServer, bucket: UPath, checkpoints: list[Path], tmp_path: Path
) -> None:
    for directory, alias in zip(checkpoints, ("champion", "candidate"), strict=True):
        registered(directory, alias)
    assert [alias_version(server.url, "longclip", alias) for alias in ("champion", "candidate")] == ["1", "2"]
    stored = [path for path in bucket.rglob("model.safetensors") if path.parent.name == "checkpoint"]
    assert len(stored) == 2
    for version, directory in enumerate(checkpoints, start=1):
        download_checkpoint(server.url, f"models:/longclip/{version}", tmp_path / str(version))
        assert checkpoint_id(tmp_path / str(version)) == checkpoint_id(directory)
    served = open_model("models:/longclip@champion", str(tmp_path / "cache"))
    assert (served.version, served.checkpoint_id) == ("1", checkpoint_id(checkpoints[0]))
    card = MlflowClient(server.url).get_model_version("longclip", "1").description
    assert checkpoint_id(checkpoints[0]) in card
    loaded = mlflow.pyfunc.load_model("models:/longclip@champion")
    assert np.asarray(loaded.predict(["a text"])).shape == (1, 24)
    assert "Array(double)" in str(loaded.metadata.signature.outputs)
    assert np.asarray(loaded.predict(loaded.input_example)).shape == (2, 24)


def test_a_training_run_on_the_server_is_the_source_and_any_other_is_not(server: MlflowServer, tmp_path: Path) -> None:
    client = MlflowClient(server.url)
    training, deleted = (start_run(server.url, "training", name, {}) for name in ("training", "deleted"))
    client.log_metric(training, "loss", 0.5, step=7)
    client.delete_run(deleted)
    end_run(server.url, training, succeeded=True)
    sources = {}
    for run_id in (training, deleted, "0" * 32, "not a run"):
        directory = tmp_path / run_id / "checkpoint"
        # Longer than the database's column for descriptions.
        metadata = {"step": 7, "settings": {"input": "/data/" + "x" * 6000}, **Lineage(run_id=run_id).metadata()}
        save_checkpoint(new_model(tiny_config()), directory, metadata)
        registered(directory, "candidate")
        version = client.get_model_version_by_alias("longclip", "candidate")
        assert version.tags["run_id"] == run_id
        assert "the whole card is `artifacts/README.md`" in version.description
        sources[run_id] = version.run_id
        model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert sources[training] == training
    assert client.get_run(training).info.status == "FINISHED"
    others = [client.get_run(sources[run_id]) for run_id in sources if run_id != training]
    assert {run.info.run_name for run in others} == {"register-longclip"}
    assert all(run.info.status == "FINISHED" for run in others)
    (output,) = client.get_run(training).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert [(metric.key, metric.value, metric.step) for metric in logged.metrics] == [("loss", 0.5, 7)]
    assert model.source_run_id == others[-1].info.run_id
    add_to_card(server.url, "longclip", str(version.version), "Promotion", "Made `champion`.")
    card = mlflow.artifacts.load_text(f"models:/longclip/{version.version}/artifacts/README.md")
    assert "## Promotion\n\nMade `champion`." in card
    assert "## Recipe" in card


def test_concurrent_moves_of_an_alias_have_one_winner(server: MlflowServer, checkpoints: list[Path]) -> None:
    for directory in checkpoints:
        registered(directory, "candidate")
    before = alias_version(server.url, "longclip", "champion")

    def move(version: str) -> str | None:
        try:
            move_alias(server.url, "longclip", "champion", before, version)
        except PromotionError:
            return None
        return version

    with ThreadPoolExecutor(4) as pool:
        moved = [version for version in pool.map(move, ["2", "3", "4", "2"]) if version]
    assert len(moved) == 1
    assert alias_version(server.url, "longclip", "champion") == moved[0]
    assert replaced_version(server.url, "longclip", moved[0]) == before


def test_files_changed_in_s3_are_rejected(
    server: MlflowServer, bucket: UPath, checkpoints: list[Path], tmp_path: Path
) -> None:
    before = {path.path for path in bucket.rglob("model.safetensors")}
    registered(checkpoints[1], "candidate")
    version = alias_version(server.url, "longclip", "candidate")
    (weights,) = [path for path in bucket.rglob("model.safetensors") if path.path not in before]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    model = f"models:/longclip/{version}"
    with pytest.raises(CheckpointError, match=r"the content of 'model\.safetensors' was changed"):
        download_checkpoint(server.url, model, tmp_path / "downloaded")
    with pytest.raises(CheckpointError, match=r"the content of 'model\.safetensors' was changed"):
        open_model(model, str(tmp_path / "cache"))
    assert not (tmp_path / "downloaded").exists()
    assert list((tmp_path / "cache").glob("*")) == []


def report(step: int) -> list[dict[str, Any]]:
    """What a training worker reports."""
    figures = {"loss": 1.0 / step, "caption_loss": 1.0 / step, "pairs_per_second": 9.0, "batch_seconds": 0.1}
    return [{"step": step, "total_steps": 6, **figures}]


def test_training_continues_without_mlflow_and_sends_metrics_later(
    server: MlflowServer,
    checkpoints: list[Path],
    ray_cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_id = start_run(server.url, "outage", "training", {"seed": 1})
    callback = MetricsToMlflow(server.url, run_id)
    callback.after_report(None, report(1), None)
    server.stop()
    for step in (2, 3):
        callback.after_report(None, report(step), None)
    assert capsys.readouterr().err.count("warning: MLflow does not take metrics; training continues") == 1
    end_run(server.url, run_id, succeeded=True)
    assert "warning: MLflow did not record the end of run" in capsys.readouterr().err
    impatient = MetricsToMlflow(server.url, run_id)
    impatient.LAST_SECONDS = 0.0
    impatient.after_report(None, report(6), None)
    assert f"MLflow did not take 4 metrics of run {run_id}, and they are lost" in capsys.readouterr().err

    rows = write_rows(tmp_path / "rows.parquet", rows=8)
    refused: list[tuple[type[Exception], Any]] = [
        (ConfigError, lambda: registered(checkpoints[0], "champion")),
        (CheckpointError, lambda: open_model("models:/longclip@champion", str(tmp_path / "cache"))),
        (
            ConfigError,
            lambda: finetune.main(
                [
                    part
                    for setting in (
                        f"input={rows}", f"model.base={checkpoints[0]}", "model.positions=keep",
                        "optim.per_worker_batch_size=4", "loss.allow_small_batch=true", f"output={tmp_path}/run",
                    )
                    for part in ("--set", setting)
                ]
            ),
        ),
    ]  # fmt: skip
    for error, ask in refused:
        with pytest.raises(error, match=r"127\.0\.0\.1") as found:
            ask()
        assert "\n" not in str(found.value)

    server.start()
    callback.after_report(None, report(4), None)
    server.stop()
    callback.after_report(None, report(5), None)
    monkeypatch.setattr(callback, "PAUSE_SECONDS", 0.2)
    with ThreadPoolExecutor(1) as aside:
        aside.submit(callback.after_report, None, report(6), None)  # the last step, at which nobody answers yet
        server.start()
    history = MlflowClient(server.url).get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / step) for step in range(1, 7)]
    assert "lost" not in capsys.readouterr().err
    end_run(server.url, run_id, succeeded=True)
    run = MlflowClient(server.url).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {file.path for file in MlflowClient(server.url).list_artifacts(run_id)} >= {
        "settings.json",
        "environment.json",
        "curves.svg",
    }
