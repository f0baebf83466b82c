"""Finished measurements: they survive on disk, and are used again only while all that they depend on is the same."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longclip.errors import CheckpointError
from longclip.evaluation.metrics import Ranks
from pipelines.common.settings import validate
from pipelines.common.storage import Storage
from pipelines.evaluation import measurements
from pipelines.evaluation.measured import WHOLE, Answers, Choices, Measured
from pipelines.evaluation.measurements import Measurements, data_digest, measurement_key
from pipelines.evaluation.settings import TaskSettings
from pipelines.evaluation.tasks import open_task
from pipelines.registry.model_cache import model_digest
from tests.support.pictures import picture

KEY = {"method": 1, "model": "a"}


def measured(rejected: dict[str, str] | None = None) -> Measured:
    rank = torch.tensor([0, 3, 1])
    ranks = Ranks(rank, torch.zeros_like(rank), torch.tensor([1, 0.25, 0.5], dtype=torch.float64), 4)
    answers = Answers(ranks, ("a#0", "b#0", "ü\0\udc80#1"), np.array([0, 1, 2]))
    choices = Choices(np.array([], np.float32), np.array([], np.int64), 3)
    readings = {WHOLE: {"text_to_image": answers}, "cut_10": {"text_to_image": answers}}
    return Measured("own data", 248, 3, None, 0, readings, rejected or {}, {"replaced": choices})


def same(a: Any, b: Any) -> bool:
    """Whether two measurements are equal, arrays by their types and values."""
    if isinstance(a, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return type(a) is type(b) and a == b


@pytest.fixture
def store(tmp_path: Path) -> Callable[[Measured, float], Measurements]:
    def write(value: Measured, limit: float) -> Measurements:
        finished = Measurements(tmp_path / "measured", limit)
        path = finished.path("task", "model")
        path.parent.mkdir(parents=True, exist_ok=True)
        finished.write(value, KEY, path)
        return finished

    return write


def test_a_measurement_is_read_as_it_was_written(store: Callable[..., Measurements]) -> None:
    value = measured({"c": "broken"})
    found = store(value, 0.5).read("task", "model", KEY)
    assert found is not None
    assert same(found, value)
    assert found.answers["cut_10"]["text_to_image"].figures() == value.whole["text_to_image"].figures()
    assert found.answers["cut_10"]["text_to_image"].queries is found.whole["text_to_image"].queries


def test_another_key_is_not_used_and_says_why(
    store: Callable[..., Measurements], capsys: pytest.CaptureFixture[str]
) -> None:
    finished = store(measured(), 0)
    assert finished.read("task", "other", KEY) is None
    assert capsys.readouterr().out == ""
    assert finished.read("task", "model", KEY | {"model": "b", "long_text": True}) is None
    assert "task is measured again with model: changed since then: long_text, model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rejected", "before", "now", "is_used"),
    [({}, 0.5, 0, True), ({"c": "x"}, 0.5, 0.1, False), ({"c": "x"}, 0.5, 0.5, True), ({"c": "x"}, 0.5, 0.9, True)],
)
def test_a_lower_limit_measures_again_what_has_rejected_rows(
    store: Callable[..., Measurements], rejected: dict[str, str], before: float, now: float, is_used: bool
) -> None:
    folder = store(measured(rejected), before).folder
    assert (Measurements(folder, now).read("task", "model", KEY) is not None) is is_used


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10\0\0\0\0\0\0\0{}", None])
def test_a_damaged_file_is_measured_again(
    store: Callable[..., Measurements], content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = store(measured(), 0)
    path = finished.path("task", "model")
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert finished.read("task", "model", KEY) is None
    assert "cannot be read" in capsys.readouterr().err


def test_measurements_of_others_are_counted(store: Callable[..., Measurements]) -> None:
    finished = store(measured(), 0)
    assert finished.others(["task"], ["model"]) == []
    assert finished.others(["task"], ["x"]) == finished.others(["x"], ["model"]) == [finished.path("task", "model")]


def test_a_model_is_known_by_its_content(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed"
    shutil.copytree(tiny_checkpoint_dir, copy)
    digest = model_digest(str(tiny_checkpoint_dir))
    manifest = json.loads((copy / "longclip.json").read_text())
    (copy / "longclip.json").write_text(json.dumps(manifest | {"metadata": {"origin": "elsewhere"}}))
    assert model_digest(str(copy)) == digest
    for file in copy.iterdir():
        if file.name != "longclip.json":
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert model_digest(str(copy)) != digest, file
            file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not exist"):
        model_digest(str(tmp_path / "absent"))


def listed_images(folder: Path) -> Path:
    """An annotation file whose images are in another folder."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "rows").mkdir()
    lines = [json.dumps({"id": str(row), "image": f"{row}.png", "caption": "x y"}) for row in range(2)]
    (folder / "rows" / "test.jsonl").write_text("\n".join(lines))
    for row in range(2):
        (folder / "pictures" / f"{row}.png").write_bytes(picture(row))
    return folder / "rows" / "test.jsonl"


def digest(settings: TaskSettings, output: Path) -> str:
    task = open_task("mine", settings, Storage())
    return data_digest("tasks.mine.input", settings.input, task.source, Storage(), output)


def test_data_is_known_by_its_files(tmp_path: Path) -> None:
    path = tmp_path / "data" / "rows.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": [picture(0)], "caption": ["x"]}), path)
    settings, output = TaskSettings(input=str(path.parent)), path.parent / "bench"
    before = digest(settings, output)
    output.mkdir()
    (output / "report.md").touch()
    assert digest(settings, output) == before, "the benchmark's own output below the data"
    os.utime(path, (1, 1))
    assert digest(settings, output) != before


def test_images_elsewhere_belong_to_the_data(tmp_path: Path) -> None:
    path = listed_images(tmp_path)
    settings = validate(TaskSettings, {"input": str(path), "source": {"images": str(tmp_path / "pictures")}})
    before = digest(settings, tmp_path / "bench")
    (tmp_path / "pictures" / "notes.log").touch()
    assert digest(settings, tmp_path / "bench") == before
    (tmp_path / "pictures" / "1.png").write_bytes(picture(7, (50, 50)))
    assert digest(settings, tmp_path / "bench") != before


def test_the_key_holds_settings_protocol_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, classes = tmp_path / "rows.parquet", tmp_path / "classes.txt"
    pq.write_table(pa.table({"image": [picture(0)], "caption": ["x"], "name": ["cat"]}), path)
    classes.write_text("cat\ndog\n")

    def key(model: str = "m", long_text: bool = True, **values: Any) -> dict[str, Any]:
        settings = validate(TaskSettings, {"input": str(path)} | values)
        task = open_task("mine", settings, Storage())
        return measurement_key(model, task, "d", settings, {"long_text": long_text})

    zero_shot: dict[str, Any] = {"kind": "zero_shot", "classes": str(classes), "source": {"label": "name"}}
    keys = [
        *(key(), key("n"), key(long_text=False), key(text="short"), key(subset=True)),
        *(key(source={"caption": "name"}), key(**zero_shot), key(**zero_shot, templates="openai")),
    ]
    assert all(json.loads(json.dumps(one)) == one for one in keys)
    classes.write_text("cat\nfrog\n")
    keys.append(key(**zero_shot))
    monkeypatch.setattr(measurements, "METHOD", measurements.METHOD + 1)
    keys.append(key())
    assert len({json.dumps(one, sort_keys=True) for one in keys}) == len(keys)
    assert key() == key()
