"""Settings: precedence, and one clear line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import PositiveInt

from longclip.errors import ConfigError
from pipelines.common.settings import Settings, describe, load_settings, storage_path
from pipelines.training.settings import FinetuneSettings


class Inner(Settings):
    """Nested."""

    rate: float = 0.5
    """How fast."""


class Outer(Settings):
    """Example."""

    path: str
    """Where."""
    count: PositiveInt = 3
    """How many."""
    inner: Inner = Inner()


def load(*arguments: str) -> Outer:
    return load_settings(Outer, "an example", arguments)


def test_override_beats_file_beats_default(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("path: a\ncount: 5\ninner: {rate: 2}\n")
    settings = load("--config", str(config), "--set", "inner.rate=1e-3")
    assert settings == Outer(path="a", count=5, inner=Inner(rate=1e-3))
    assert load("--set", "path=x").count == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "path=x", "--set", "inner.rat=1"], "unknown setting 'inner.rat'; did you mean 'inner.rate'?"),
        (["--set", "path=x", "--set", "rate=1"], "did you mean 'inner.rate'?"),
        (["--set", "path=x", "--set", "zzz=1"], "known are path, count, inner.rate"),
        ([], "setting 'path' is missing; give it in the YAML file or as --set path=..."),
        (["--set", "path=x", "--set", "count=0"], "setting 'count' = 0"),
        (["--set", "path"], "--set 'path' is no KEY=VALUE"),
        (["--set", "path=x", "--set", "path.y=1"], "'path' is a single value"),
        (["--config", "/nowhere.yaml"], "--config '/nowhere.yaml' cannot be read"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "a: [1\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        load("--config", str(config))


def test_every_setting_of_finetune_is_documented() -> None:
    lines = describe(FinetuneSettings).splitlines()
    undocumented = [key for key, text in zip(lines[::2], lines[1::2], strict=True) if not text.strip()]
    assert not undocumented


def test_relative_paths_inside_a_submitted_job_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "working_dir_files" / "pkg"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(ConfigError, match="output='var/x' is relative"):
        storage_path("output", "var/x")
    assert storage_path("output", "/data/x") == "/data/x"
    assert storage_path("output", "s3://bucket/x") == "s3://bucket/x"
    monkeypatch.chdir(tmp_path)
    assert storage_path("output", "var/x") == str(tmp_path / "var/x")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "exactly one of model.base"),
        ({"model": {"base": "a", "architecture": {}}}, "exactly one of model.base"),
        ({"model": {"base": "a"}, "optim": {"per_worker_batch_size": 16}}, "summary loss does nothing"),
        (
            {
                "model": {"base": "a"},
                "loss": {"pca_scope": "local"},
                "optim": {"per_worker_batch_size": 33},
            },
            "on 33 rows",
        ),
        ({"model": {"architecture": {"image_size": 30}}}, "does not divide"),
        ({"model": {"base": "a"}, "workers": {"min_count": 3}}, "min_count=3 is more than workers.count=2"),
        (
            {"model": {"base": "a"}, "data": {"train": "x", "streams": 4}, "workers": {"count": 4, "min_count": 2}},
            "data.streams=4 is no multiple of 3 workers",
        ),
        ({"model": {"base": "a"}, "data": {"train": "x", "streams": 6}}, "no multiple of data.streams=6"),
        (
            {"model": {"base": "a"}, "loss": {"summary_loss_weight": 0}, "checkpoints": {"metric": "summary"}},
            "checkpoints.metric=summary needs summaries",
        ),
        (
            {"model": {"base": "a"}, "workers": {"strategy": "fsdp"}, "optim": {"ema_decay": 0.99}},
            "optim.ema_decay needs the whole model",
        ),
    ],
)
def test_finetune_refuses_settings_that_contradict_each_other(settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FinetuneSettings.model_validate({"data": {"train": "x"}} | settings)


def test_a_recipe_gives_defaults_that_settings_beat() -> None:
    common = {"data": {"train": "x"}, "model": {"base": "a"}, "optim": {"per_worker_batch_size": 64, "epochs": 2}}
    paper = FinetuneSettings.model_validate(common | {"recipe": "paper"})
    assert (paper.loss.summary_loss_weight, paper.loss.pca_scope, paper.optim.learning_rate) == (1.0, "local", 1e-6)
    assert (paper.optim.logit_scale, paper.optim.epochs) == (100.0, 2)
    tuned = FinetuneSettings.model_validate(common)
    assert tuned.recipe == "tuned"
    assert (tuned.loss.summary_loss_weight, tuned.loss.pca_scope, tuned.optim.learning_rate) == (0.1, "global", 1e-5)
    assert FinetuneSettings.model_validate(paper.model_dump()) == paper
    with pytest.raises(ValueError, match="'tuned' or 'paper'"):
        FinetuneSettings.model_validate(common | {"recipe": "papper"})


def test_a_batch_that_is_too_small_for_principal_components_can_be_accepted() -> None:
    settings = {"data": {"train": "x"}, "model": {"base": "a"}, "optim": {"per_worker_batch_size": 16}}
    accepted = FinetuneSettings.model_validate(settings | {"loss": {"allow_small_batch": True}})
    assert accepted.pca_rows <= accepted.loss.pca_dim + 1


def test_a_run_may_go_on_with_other_workers_but_not_with_another_objective() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "data": {"train": "x", "streams": 4},
            "model": {"base": "a"},
            "optim": {"per_worker_batch_size": 64},
        }
        return FinetuneSettings.model_validate(values | changes).identity()

    base = identity(workers={"count": 2})
    other_workers: dict[str, Any] = {"workers": {"count": 4}, "optim": {"per_worker_batch_size": 32, "chunk_size": 8}}
    assert identity(**other_workers, log_every_steps=1, validation={"rows": 5}) == base
    assert identity(workers={"count": 4}) != base, "the global batch is another one"
    assert identity(workers={"count": 2, "bf16": True}) != base
    assert identity(workers={"count": 2}, seed=1) != base
    halves: dict[str, Any] = {"workers": {"count": 2}, "optim": {"per_worker_batch_size": 128}}
    quarters: dict[str, Any] = {"workers": {"count": 4}, "optim": {"per_worker_batch_size": 64}}
    assert identity(**halves) == identity(**quarters)
    local = {"loss": {"pca_scope": "local"}}
    assert identity(**halves, **local) != identity(**quarters, **local), (
        "each worker's own components: another objective"
    )
