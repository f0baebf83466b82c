"""Outputs that are replaced: only those of the same job, never the files of others."""

import json
from pathlib import Path

import pytest

from longclip.errors import ConfigError
from pipelines import benchmark, sample_data
from pipelines.common.parquet_set import MANIFEST
from pipelines.common.run_directory import refuse_other_output

MARKER = "marker"


def check(output: Path) -> None:
    refuse_other_output("output", output, lambda directory: (directory / MARKER).is_file())


def test_absent_empty_and_own_outputs_may_be_replaced(tmp_path: Path) -> None:
    check(tmp_path / "absent")
    check(tmp_path)
    (tmp_path / MARKER).touch()
    check(tmp_path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    for output in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ConfigError, match=f"output='{output}' exists and was not made by this job; choose another"):
            check(output)


@pytest.mark.parametrize("manifest", [None, {"identity": {"job": "prepare"}, "splits": {"val": 1}}])
def test_sample_data_refuses_the_directory_of_another_before_it_starts(tmp_path: Path, manifest: dict | None) -> None:
    (tmp_path / "thesis.txt").touch()
    if manifest:
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="was not made by this job"):
        sample_data.main(["--set", f"output={tmp_path}"])
    assert (tmp_path / "thesis.txt").exists()


def test_benchmark_refuses_the_directory_of_another_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    settings = ["models={a: nowhere}", "tasks={b: {input: nowhere}}", f"output={tmp_path}"]
    with pytest.raises(ConfigError, match="was not made by this job"):
        benchmark.main([part for each in settings for part in ("--set", each)])
    assert (tmp_path / "thesis.txt").exists()
