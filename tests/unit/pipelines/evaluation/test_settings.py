"""Settings of the benchmark: names that become file names."""

from typing import Any

import pytest

from longclip.errors import ConfigError
from pipelines.common.settings import validate
from pipelines.evaluation.settings import BenchmarkSettings, PromoteSettings

TASK = {"input": "data"}


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "..", "", "a b"])
def test_names_that_cannot_be_file_names_are_refused(name: str) -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        (BenchmarkSettings, {"tasks": {name: TASK}, "models": {"m": "x"}}),
        (BenchmarkSettings, {"tasks": {"t": TASK}, "models": {name: "x"}}),
        (PromoteSettings, {"tasks": {name: TASK}}),
    ]
    for kind, values in cases:
        with pytest.raises(ConfigError, match="cannot be a file name; use only letters") as error:
            validate(kind, values)
        assert "\n" not in str(error.value)


def test_usual_names_are_accepted() -> None:
    names = {"coco-5k_v1.0": "x", "longclip@3": "y"}
    assert validate(BenchmarkSettings, {"tasks": {"imagenet-v2": TASK}, "models": names}).models == names


@pytest.mark.parametrize(
    ("tasks", "models", "problem"),
    [
        (["a", "a.b"], ["b.c", "c"], "would be written to the same file a.b.c.parquet; rename one of them"),
        (["results"], ["m"], "tasks has 'results', whose file would be that of all results"),
    ],
)
def test_names_that_lead_to_the_same_file_are_refused(tasks: list[str], models: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validate(BenchmarkSettings, {"tasks": dict.fromkeys(tasks, TASK), "models": dict.fromkeys(models, "x")})
