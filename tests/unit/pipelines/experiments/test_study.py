"""The study: which models it trains, with which settings, and what it concludes from their ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longclip.errors import ConfigError, LongClipError
from longclip.evaluation.metrics import Ranks
from pipelines import benchmark, study
from pipelines.common.run_directory import claim_directory
from pipelines.common.settings import load_settings
from pipelines.demo import DemoSettings, demo_steps
from pipelines.evaluation.measured import WHOLE, Answers, Measured, write_ranks
from pipelines.evaluation.settings import BenchmarkSettings
from pipelines.experiments import study as study_job
from pipelines.experiments.cells import ARMS, PAIRS, Cell, Stage, stages
from pipelines.experiments.steps import Step
from pipelines.experiments.study_report import StudyReport, stage_plot, stage_result
from pipelines.experiments.study_settings import StudySettings
from pipelines.experiments.study_steps import StudySteps
from pipelines.sample_data import SampleDataSettings
from pipelines.summarize import SummarizeSettings
from pipelines.training.settings import FinetuneSettings

SETTINGS: dict[str, type[Any]] = {
    "sample_data": SampleDataSettings,
    "finetune": FinetuneSettings,
    "summarize": SummarizeSettings,
    "benchmark": BenchmarkSettings,
}
WEIGHTS, STRATEGIES, DIMS = [0.0, 0.1, 0.3], ["extractive", "drop_first"], [8, 32]


def plan(combine: bool = False) -> list[Stage]:
    return stages([0, 1, 2], [0], (0.3, "extractive", 32), WEIGHTS, STRATEGIES, DIMS, combine)


def test_arms_have_every_seed_and_variations_differ_in_one_setting() -> None:
    arms, *varied = plan()
    assert [[cell.seed for cell in row] for row in arms.rows.values()] == [[0, 1, 2]] * len(ARMS)
    assert [cell.seed for cell in arms.cells] == sorted([0, 1, 2] * len(ARMS))  # a seed is complete before the next one
    usual = Cell("both", 0, 0.3, "extractive", 32)
    assert [list(stage.rows) for stage in varied] == [["0", "0.1", "0.3"], STRATEGIES, ["8", "32"]]
    assert varied[0].pairs == [("0.3", "0"), ("0.3", "0.1")]
    for stage in varied:
        for cell in stage.cells:
            changed = [getattr(cell, name) != getattr(usual, name) for name in ("weight", "strategy", "pca_dim")]
            assert cell == Cell("kps", 0) or (cell.arm == "both" and sum(changed) <= 1)
        assert usual in stage.cells


def test_default_is_the_baseline_even_if_it_is_not_varied() -> None:
    weights = stages([0], [0], (0.3, "extractive", 32), [1.0], STRATEGIES, DIMS, False)[1]
    assert list(weights.rows) == ["1", "0.3"]
    assert weights.pairs == [("0.3", "1")]


def test_cells_with_equal_training_are_merged() -> None:
    cells = {cell for stage in plan(combine=True) for cell in stage.cells}
    assert len(cells) == len({cell.name for cell in cells})
    # 5 arms x 3 seeds; all combinations of 2 weights, 2 strategies and 2 dimensions, one of which is an arm
    assert len(cells) == 15 + 8 - 1


def test_every_step_is_one_that_its_entry_accepts(tmp_path: Path) -> None:
    settings = StudySettings(output=str(tmp_path))
    steps = StudySteps(settings, tmp_path)
    found: dict[str, list] = {}
    for step in steps.of_stage(plan()[0]):
        entry = step.entry.__name__.rpartition(".")[2]
        found.setdefault(entry, []).append(load_settings(SETTINGS[entry], "", step.argv))
    trained = {Path(run.output).name: run for run in found["finetune"]}
    assert trained["base-1"].model.architecture
    assert (trained["base-1"].seed, trained["base-1"].columns.caption) == (1, "short_caption")
    direct, both = trained["direct-1"], trained["both-1-w0.3-extractive-d32"]
    assert (direct.model.positions, direct.uses_summaries) == ("interpolate", False)
    assert (both.model.positions, both.loss.summary_loss_weight, both.loss.pca_dim) == ("stretch", 0.3, 32)
    assert both.model.base == trained["kps-1"].model.base == str(Path(trained["base-1"].output) / "checkpoint")
    assert both.input == found["summarize"][0].output
    measured = {name: model for run in found["benchmark"] for name, model in run.models.items()}
    assert measured["none-1"] == both.model.base
    assert measured["both-1-w0.3-extractive-d32"] == str(Path(both.output) / "checkpoint")
    assert {task.input for run in found["benchmark"] for task in run.tasks.values()} == {found["sample_data"][1].output}


def test_paths_with_the_characters_of_yaml_reach_the_entries(tmp_path: Path) -> None:
    directory = tmp_path / "a: b, {c} #d 'é😀"
    tests = {"short": {"input": f"{directory}/test", "column": "long: text"}}
    given = {"input": "s3://bucket/train", "base_input": str(directory), "tests": tests}
    steps = StudySteps(StudySettings.model_validate(given), directory)
    measured = load_settings(BenchmarkSettings, "", steps.measurement(Cell("none", 0)).argv)
    assert measured.models == {"none-0": str(directory / "runs" / "base-0" / "checkpoint")}
    task = measured.tasks["short"]
    assert (task.input, task.source.caption) == (f"{directory}/test", "long: text")
    assert load_settings(SummarizeSettings, "", steps.summaries("extractive").argv).input == "s3://bucket/train"
    demo = next(step for step in demo_steps(DemoSettings(), directory) if step.title == "benchmark")
    assert load_settings(BenchmarkSettings, "", demo.argv).tasks["long"].input == str(directory / "scenes-test")


def test_a_test_set_is_long_or_short() -> None:
    sets = ["input=a", "base_input=b", "tests={mine: {input: c}}"]
    with pytest.raises(ConfigError, match="tests has 'mine'; name a test set long or short"):
        load_settings(StudySettings, "", [part for each in sets for part in ("--set", each)])


def test_study_can_add_cells_but_not_change_data(tmp_path: Path) -> None:
    def claim(**settings: object) -> None:
        claim_directory("output", tmp_path, StudySettings.model_validate(settings), StudySettings.identity)

    claim(seeds=[0])
    claim(seeds=[0, 1], weights=[0.2])
    with pytest.raises(ConfigError, match=r"output='.*' holds a run with other settings \(train_rows\)"):
        claim(train_rows=7)


@pytest.mark.parametrize(
    ("override", "message"),
    [("input=/x", "input, base_input and tests belong together"), ("varied_seeds=[4]", "varied_seeds has 4")],
)
def test_settings_that_do_not_go_together_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(StudySettings, "", ["--set", override])


def write_hits(cells: Path, name: str, hit: np.ndarray) -> None:
    """What a benchmark leaves of a cell."""
    order = np.random.default_rng(len(name)).permutation(len(hit))  # rows need not be in the same order
    rank = torch.where(torch.tensor(hit[order]), 0, 4)
    ranks = Ranks(rank, torch.zeros_like(rank), 1 / (rank + 1.0).double(), len(hit))
    answers = {"text_to_image": Answers(ranks, tuple(f"scene-{number:03d}" for number in order), order // 2)}
    measured = Measured("own data", 248, len(hit), len(hit), 0, {WHOLE: answers}, {})
    write_ranks(measured, cells / name / "ranks" / f"long.{name}.parquet")


def test_seeds_are_averaged_and_arms_compared_query_by_query(tmp_path: Path) -> None:
    queries = 200
    first = {"none": 20, "direct": 80, "kps": 80, "pcm": 120, "both": 160}  # the hits are the first queries
    stage = stages([0, 1], [0], (0.3, "extractive", 32), WEIGHTS, STRATEGIES, DIMS, False)[0]
    for cell in stage.cells:
        write_hits(tmp_path, cell.name, np.arange(queries) < first[cell.arm] + 10 * cell.seed)
    result = stage_result(stage, tmp_path)
    (line,) = result.lines[ARMS["both"].title]
    assert line.by_seed == [0.8, 0.85]
    low, high = line.interval
    assert 0.7 < low < 0.825 < high < 0.9
    found = dict(zip(PAIRS, [change for (change,) in result.changes().values()], strict=True))
    same = found["direct", "kps"]
    assert (same.comparison.difference, same.comparison.p_value, same.by_seed) == (0, 1, [0, 0])
    assert found["pcm", "both"].by_seed == pytest.approx([0.2, 0.2])
    better = found["pcm", "both"].comparison
    assert (better.difference, better.better, better.worse) == (pytest.approx(0.2), 50, 0)
    assert better.low > 0
    assert better.p_value < 0.01

    markdown = StudyReport([result]).markdown()
    assert f"| {ARMS['both'].title} | 82.5 [" in markdown
    assert "(80.0, 85.0)" in markdown
    assert "| both | PCM | +20.0 [" in markdown
    assert "(+20.0, +20.0), p < 0.001" in markdown
    plot = stage_plot(result)
    assert plot.count('class="mean"') == len(ARMS)
    assert plot.count("<circle") == 2 * len(ARMS)


def test_the_report_holds_every_stage_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def run_step(number: str, step: Step, directory: Path) -> None:
        done.append(step.title)
        if "drop_first" in step.title and "broken" not in done:
            done.append("broken")
            raise LongClipError("the machine was lost")
        name = step.title.removeprefix("measure ")
        if step.entry is benchmark and not (directory / "cells" / name).exists():
            write_hits(directory / "cells", name, np.arange(40) % (2 + len(name) % 3) == 0)

    monkeypatch.setattr(study_job, "connect", lambda cpus: None)
    monkeypatch.setattr(study_job, "run_step", run_step)
    command = [f"output={tmp_path}", "seeds=[3, 4]", "varied_seeds=[3]", "strategies=[extractive, drop_first]"]
    arguments = [part for setting in command for part in ("--set", setting)]
    with pytest.raises(LongClipError, match="the machine was lost"):
        study.main(arguments)
    stages_of = [entry["stage"] for entry in json.loads((tmp_path / "report" / "report.json").read_text())]
    assert stages_of == ["Arms", "Weight of the summary loss"]
    study.main(arguments)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md", "report.json", "arms.svg", "weight-of-the-summary-loss.svg", "summary-strategy.svg",
        "principal-components.svg",
    }  # fmt: skip
    # 2 x 5 arms, then weights 0.1 and 1, drop_first, 8 and 16 components
    assert "study: 15 rows in, 15 out" in capsys.readouterr().out
    assert done.count("base of seed 3") == 2  # once in each run, whoever needs it
