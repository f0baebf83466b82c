"""Settings of training: recipes, and settings that contradict each other."""

from pathlib import Path
from typing import Any

import pytest

from longclip.errors import ConfigError
from pipelines.common.settings import load_settings
from pipelines.training.settings import FinetuneSettings, Model


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
            {"model": {"base": "a"}, "input": "x", "data": {"streams": 4}, "workers": {"count": 4, "min_count": 2}},
            "data.streams=4 is not a multiple of 3 workers",
        ),
        ({"model": {"base": "a"}, "input": "x", "data": {"streams": 6}}, "not a multiple of data.streams=6"),
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
        FinetuneSettings.model_validate({"input": "x"} | settings)


def finetune_settings(*overrides: str) -> FinetuneSettings:
    arguments = [part for override in ("input=x", "model.base=a", *overrides) for part in ("--set", override)]
    return load_settings(FinetuneSettings, "", arguments)


def test_settings_beat_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    paper = finetune_settings("recipe=paper", "optim.epochs=2")
    assert (paper.loss.summary_loss_weight, paper.loss.pca_scope, paper.optim.learning_rate) == (1.0, "local", 1e-6)
    assert (paper.optim.logit_scale, paper.optim.epochs) == (100.0, 2)
    assert "longclip/training/recipes/paper.yaml" in capsys.readouterr().out
    assert FinetuneSettings.model_validate(paper.model_dump()) == paper


def test_a_recipe_is_below_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: paper\nloss: {pca_scope: global}\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--set", "input=x", "--set", "model.base=a"]
    settings = load_settings(FinetuneSettings, "", arguments)
    assert (settings.loss.pca_scope, settings.loss.summary_loss_weight) == ("global", 1.0)


def test_the_default_recipe_is_the_defaults() -> None:
    assert finetune_settings() == FinetuneSettings(input="x", model=Model(base="a"))


def test_recipe_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {learning_rate: 3e-5}\n")
    assert finetune_settings(f"recipe={path}").optim.learning_rate == 3e-5
    path.write_text("optim: {learning_rat: 3e-5}\n")
    with pytest.raises(ConfigError, match=r"did you mean 'optim.learning_rate'\?"):
        finetune_settings(f"recipe={path}")
    path.write_text("output: /data\n")
    with pytest.raises(ConfigError, match="sets 'output'; a recipe sets only loss and optim"):
        finetune_settings(f"recipe={path}")
    path.write_text("optim: {epochs: many}\n")
    with pytest.raises(ConfigError, match=r"recipe '.*mine\.yaml': setting 'optim\.epochs' = 'many'"):
        finetune_settings(f"recipe={path}")


def test_recipe_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.YML").write_text("optim: {epochs: 3}\n")
    assert finetune_settings("recipe=~/mine.YML").optim.epochs == 3


@pytest.mark.parametrize("recipe", ["papper", "../recipes/paper", "./tuned", "", "x" * 300])
def test_unknown_recipe_is_one_clear_line(recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe='.*' is unknown; give one of paper, tuned, or a path that ends in"):
        finetune_settings(f"recipe={recipe}")


def test_recipe_path_that_is_no_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "directory.yaml").mkdir()
    for path, reason in (
        (tmp_path / "directory.yaml", "Is a directory"),
        (tmp_path / "none.yaml", "No such file"),
        (f"{'x' * 300}.yaml", "File name too long"),
    ):
        with pytest.raises(ConfigError, match=rf"recipe '.*' cannot be read: {reason}"):
            finetune_settings(f"recipe={path}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=4294967296", "setting 'seed'"),
        ("optim.learning_rate=inf", "setting 'optim.learning_rate' = 'inf': Input should be a finite number"),
        ("optim.weight_decay=inf", "setting 'optim.weight_decay'"),
        ("optim.logit_scale=inf", "setting 'optim.logit_scale'"),
        ("loss.summary_loss_weight=inf", "setting 'loss.summary_loss_weight'"),
    ],
)
def test_finetune_refuses_numbers_that_it_cannot_use(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune_settings(override)
    assert expected in str(caught.value)


def test_architecture_width_is_a_multiple_of_its_heads() -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture\.vision\.heads=5 does not divide width=128"):
        finetune_settings("model.base=null", "model.architecture.vision.heads=5")


def test_a_batch_that_is_too_small_for_principal_components_can_be_accepted() -> None:
    settings = {"input": "x", "model": {"base": "a"}, "optim": {"per_worker_batch_size": 16}}
    accepted = FinetuneSettings.model_validate(settings | {"loss": {"allow_small_batch": True}})
    assert accepted.pca_rows <= accepted.loss.pca_dim + 1


def test_resume_with_other_workers_but_not_with_another_objective() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "input": "x",
            "data": {"streams": 4},
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
