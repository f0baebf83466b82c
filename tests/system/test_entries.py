"""Entries as users meet them: mistakes are one line and an exit code, broken rows are counted and kept apart."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from mlflow.tracking import MlflowClient

from longclip.checkpoint import load_checkpoint, new_model, save_checkpoint
from longclip.errors import ConfigError, DataError, TrainingError
from longclip.index import PublishedIndex, version_directory, version_manifests
from longclip.lineage import read_lineage
from pipelines import benchmark, embed, finetune, promote, register, rollback, sample_data, summarize
from pipelines.common.entry import run_entry, user_error
from tests.support.consumers import CONSUMERS, assert_same_embeddings
from tests.support.lineage import assert_champion_leads_back, assert_trained_from, run_documented_script
from tests.support.places import ROOT
from tests.support.rows import write_rows
from tests.support.tiny_clip import tiny_config

ENTRIES = {module.__name__.rpartition(".")[2]: module for module in (benchmark, embed, finetune, register, summarize)}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP of 77 positions, which can be stretched."""
    directory = tmp_path_factory.mktemp("base") / "checkpoint"
    save_checkpoint(new_model(tiny_config(context_length=77)), directory, {"origin": "test"})
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run an entry with settings; gives its exit code, standard output and standard error."""

    def run_settings(name: str, *settings: str) -> tuple[int, str, str]:
        arguments = [part for setting in settings for part in ("--set", setting)]
        with pytest.raises(SystemExit) as left:
            run_entry(lambda: ENTRIES[name].main(arguments))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run_settings


@pytest.mark.parametrize(
    ("name", "settings", "code", "expected"),
    [
        ("finetune", ["input={dir}/none", "model.base={base}"], 3, "input='{dir}/none' does not exist"),
        ("finetune", ["input={text_only}", "model.base={base}"], 3, "column 'image' is missing"),
        ("finetune", ["input={empty}", "model.base={base}"], 3, "has no rows"),
        ("finetune", ["input={rows}", "model.base={base}"], 3, "fewer than one global batch"),
        ("finetune", ["input={rows}", "model.base={model}"], 4, "already; set model.positions=keep"),
        ("finetune", ["input={rows}", "model.base={dir}/none"], 4, "does not exist"),
        ("finetune", ["input={rows}", "model.base={bert}"], 4, "is a 'bert' model, not a CLIP"),
        ("finetune", ["input={rows}", "model.bass=x"], 2, "did you mean 'model.base'?"),
        ("benchmark", ["models={{a: {model}}}", "tasks.x.input={rows}", "tasks.x.source.caption=q"], 3, "column ('q')"),
        ("benchmark", ["models={{a: {model}}}", "tasks.x.input={note}"], 3, "has an unknown layout"),
        (
            "benchmark",
            ["models={{a: {model}}}", "tasks.x.input={rows}", "base=b"],
            2,
            "base has 'b', which is unknown; known are a",
        ),
        ("embed", ["input={text_only}", "model={model}"], 3, "column 'image' is missing"),
        ("embed", ["input={rows}", "model={note}"], 4, "not a weights file (safetensors, PyTorch or TorchScript)"),
        ("summarize", ["input={rows}", "output={dir}/out", "strategy=best"], 2, "setting 'strategy' = 'best'"),
        ("summarize", ["input={rows}", "output={dir}/out", "columns.caption=text"], 3, "column 'text' is missing"),
        ("register", ["checkpoint={dir}/none"], 4, "does not exist"),
    ],
)
def test_user_errors_are_one_line_and_an_exit_code(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    tiny_checkpoint_dir: Path,
    base_dir: Path,
    name: str,
    settings: list[str],
    code: int,
    expected: str,
) -> None:
    places = {
        "dir": tmp_path,
        "model": tiny_checkpoint_dir,
        "base": base_dir,
        "rows": write_rows(tmp_path / "rows.parquet"),
        "text_only": write_rows(tmp_path / "text.parquet", image=None),
        "empty": write_rows(tmp_path / "empty.parquet", rows=0),
        "bert": tmp_path / "bert",
        "note": tmp_path / "note.txt",
    }
    places["note"].write_text("not a Parquet")
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(places["bert"])
    output = [] if name in ("register", "summarize") else [f"output={tmp_path}/output"]
    exit_code, _, err = run(name, *[setting.format(**places) for setting in settings], *output)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected.format(**places) in lines[0]
    assert exit_code == code
    assert "Traceback" not in err


def test_help_explains_and_user_errors_set_the_exit_code() -> None:
    command = [sys.executable, str(ROOT / "pipelines" / "finetune.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "loss.summary_loss_weight = 0.1" in shown.stdout
    assert "ray job submit" in shown.stdout
    wrong = subprocess.run([*command, "--set", "inptu=x"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert wrong.returncode == ConfigError.exit_code
    assert "did you mean 'input'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_user_errors_are_unwrapped_from_errors_of_ray() -> None:
    mistake = DataError("column missing")
    wrapped = RuntimeError("worker failed")
    wrapped.__cause__ = ValueError("in between")
    wrapped.__cause__.__context__ = mistake
    assert user_error(wrapped) is mistake
    assert user_error(RuntimeError("a bug")) is None


def test_unreadable_images_are_quarantined_and_counted(
    run: Callable[..., tuple[int, str, str]], ray_cluster: None, tmp_path: Path, tiny_checkpoint_dir: Path
) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=30, broken=(4, 17))
    settings = [f"input={rows}", f"model={tiny_checkpoint_dir}", f"output={tmp_path}/index", f"cache={tmp_path}/cache"]
    code, _, err = run("embed", *settings)
    assert code == DataError.exit_code
    assert "more than max_rejected_fraction=0.01 allows" in err
    assert version_manifests(tmp_path / "index") == []

    code, out, _ = run("embed", *settings, "max_rejected_fraction=0.1")
    assert code == 0
    assert "embed: 30 rows in, 28 out, 2 rejected" in out
    index = PublishedIndex.open(version_directory(tmp_path / "index", 1))
    kept = index.shards[0].items["id"].to_pylist()
    assert kept == [f"row-{number:03d}" for number in range(30) if number not in (4, 17)]
    quarantine = pq.read_table(tmp_path / "index" / "quarantine.parquet").to_pylist()
    assert [row["id"] for row in sorted(quarantine, key=lambda row: row["id"])] == ["row-004", "row-017"]
    assert all("cannot be decoded" in row["reason"] and row["stage"] == "embed" for row in quarantine)


def test_duplicate_ids_never_become_an_index(
    run: Callable[..., tuple[int, str, str]], ray_cluster: None, tmp_path: Path, tiny_checkpoint_dir: Path
) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=4, id=["a", "b", "a", "c"])
    code, _, err = run("embed", f"input={rows}", f"model={tiny_checkpoint_dir}", f"output={tmp_path}/index")
    assert code == DataError.exit_code
    assert "id 'a' occurs more than once" in err
    assert version_manifests(tmp_path / "index") == []


def test_summarize_keeps_columns_and_counts_rows_without_caption(
    run: Callable[..., tuple[int, str, str]], ray_cluster: None, tmp_path: Path
) -> None:
    captions = [f"First of {number}. Second of {number}." for number in range(20)]
    rows = write_rows(tmp_path / "rows.parquet", rows=20, caption=[None, " ", *captions[2:]], summary=None)
    settings = [f"input={rows}", f"output={tmp_path}/out", "strategy=drop_first", "max_rejected_fraction=0.1"]
    code, out, _ = run("summarize", *settings)
    assert code == 0
    assert "summarize: 20 rows in, 18 out, 2 rejected" in out
    table = pq.read_table(tmp_path / "out").sort_by("id")
    assert table["summary"].to_pylist() == [f"Second of {number}." for number in range(2, 20)]
    assert set(table["summary_source"].to_pylist()) == {"drop_first"}
    assert table.column_names[:3] == ["id", "image", "caption"]
    assert pq.read_table(tmp_path / "out" / "_quarantine.parquet")["id"].to_pylist() == ["row-000", "row-001"]


def test_error_for_non_finite_gradients_says_what_to_change(
    run: Callable[..., tuple[int, str, str]],
    ray_cluster: None,
    tmp_path: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    rows = write_rows(tmp_path / "rows.parquet", rows=64)
    settings = [f"input={rows}", f"model.base={base_dir}", f"output={tmp_path}/run", "workers.count=1"]
    optim = ["optim.per_worker_batch_size=8", "optim.chunk_size=4", "loss.allow_small_batch=true"]
    hopeless = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "optim.max_skipped_steps=1", "log_every_steps=1"]
    code, out, err = run("finetune", *settings, *optim, *hopeless)
    assert code == TrainingError.exit_code
    assert "the gradient was not finite in 2 of 3 steps, more than optim.max_skipped_steps=1; lower optim." in err
    assert "step 1/8: loss" in out
    (experiment,) = MlflowClient().search_experiments(filter_string="name = 'longclip'")
    (tracked,) = MlflowClient().search_runs([experiment.experiment_id])
    assert tracked.info.status == "FAILED"
    # Every row is a component of so small a batch.
    assert {"retained_variance", "pca_gap", "data_wait_share", "tokens_per_second"} <= tracked.data.metrics.keys()
    assert tracked.data.metrics["retained_variance"] == 1.0
    # Reports are sent asynchronously, so training may end before the last one arrives.
    skipped = {
        point.step: point.value for point in MlflowClient().get_metric_history(tracked.info.run_id, "skipped_steps")
    }
    assert skipped.items() <= {1: 0.0, 2: 1.0}.items()
    assert 1 in skipped


@pytest.mark.slow
def test_from_scenes_to_a_registered_model(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step of the demo with two training steps: outputs meet, models load, a rerun resumes, and the registry
    leads from the champion back to its data."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def step(main: Callable[[Sequence[str]], None], *arguments: str) -> str:
        main(arguments)
        return capsys.readouterr().out

    def sets(*settings: str) -> list[str]:
        return [part for setting in settings for part in ("--set", setting)]

    configs = ROOT / "pipelines" / "configs"
    small = ["model.architecture.text.layers=1", "model.architecture.vision.layers=1", "optim.epochs=1"]
    step(sample_data.main, *sets("rows=96", f"output={tmp_path}/scenes"))
    base = ["--config", str(configs / "demo_base.yaml")]
    base += sets(f"input={tmp_path}/scenes", f"output={tmp_path}/base", "optim.per_worker_batch_size=20", *small)
    out = step(finetune.main, *base)
    assert "80 pairs seen, 80 of 96 rows per epoch" in out, "the rows of the incomplete last batch must be said"
    assert load_checkpoint(tmp_path / "base" / "checkpoint").context_length == 77

    both = "strategy=[extractive, drop_first]"
    step(summarize.main, *sets(f"input={tmp_path}/scenes", f"output={tmp_path}/summarized", both))
    tuned = ["--config", str(configs / "demo_finetune.yaml")]
    tuned += sets(f"input={tmp_path}/summarized", f"model.base={tmp_path}/base/checkpoint")
    tuned += sets(f"output={tmp_path}/tuned", "optim.per_worker_batch_size=20", "optim.epochs=1")
    step(finetune.main, *tuned)
    checkpoint = tmp_path / "tuned" / "checkpoint"
    model = transformers.CLIPModel.from_pretrained(checkpoint)
    stretched = model.text_model.embeddings.position_embedding.weight
    before = load_checkpoint(tmp_path / "base" / "checkpoint").model.text_model.embeddings.position_embedding.weight
    assert stretched.shape[0] == 248
    assert (stretched[:20] == before[:20]).all(), "kept positions moved"
    assert (stretched[20:24] != before[20:21]).any()

    client = MlflowClient()
    lineage = assert_trained_from(client, checkpoint, tmp_path / "summarized", tmp_path / "base" / "checkpoint")
    weights = (checkpoint / "model.safetensors").read_bytes()
    step(finetune.main, *tuned)
    assert read_lineage(checkpoint) == lineage, "a job that resumes continues its MLflow run"
    assert (checkpoint / "model.safetensors").read_bytes() == weights, "a finished run must not train again"
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        step(finetune.main, *tuned, *sets("seed=1"))

    finetuned = load_checkpoint(checkpoint)
    for name, (embeddings, tolerance) in CONSUMERS.items():
        (tmp_path / name).mkdir()
        assert_same_embeddings(embeddings(finetuned, tmp_path / name), finetuned, tolerance)

    models = f"models={{base: {tmp_path}/base/checkpoint, tuned: {checkpoint}}}"
    tasks = [
        f"tasks.{name}={{input: {tmp_path}/scenes, source: {{caption: {column}}}, text: {name}}}"
        for name, column in (("long", "caption"), ("short", "short_caption"))
    ]
    report = step(benchmark.main, *sets(models, *tasks, f"output={tmp_path}/bench", "perturbation_draws=1"))
    assert "tuned reads 248 tokens." in report
    results = f"results={tmp_path}/bench/results.json"
    out = step(register.main, *sets(f"checkpoint={checkpoint}", results, "alias=champion"))
    assert "models:/longclip/1" in out
    step(register.main, *sets(f"checkpoint={checkpoint}", results))
    step(promote.main, *sets(tasks[0], f"directory={tmp_path}/var", f"cache={tmp_path}/cache"))
    figures = json.loads((tmp_path / "bench" / "results.json").read_text())["results"]["tuned"]
    assert_champion_leads_back(client, lineage, figures, tmp_path / "champion")
    printed = run_documented_script()
    for value in (lineage.run_id, lineage.data_digest, lineage.base_checkpoint_id, "Version 2 against champion 1"):
        assert str(value) in printed
    loaded = mlflow.pyfunc.load_model("models:/longclip@champion")
    assert np.asarray(loaded.predict(["a red circle"])).shape == (1, 128)

    step(rollback.main)
    record = client.get_run(client.get_model_version("longclip", "1").tags["rollback_run_id"])
    assert (record.data.params["from_version"], record.data.params["to_version"]) == ("2", "1")
    description = client.get_model_version("longclip", "2").description
    assert "Made `champion` in place of version 1" in description
    assert "Rolled back to version 1" in description
    assert client.get_model_version_by_alias("longclip", "champion").version == 1
