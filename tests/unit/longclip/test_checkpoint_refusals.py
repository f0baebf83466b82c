"""Checkpoints in Hugging Face's layout whose files do not fit each other: refused with names, never filled in."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from longclip.checkpoint import Checkpoint, load_checkpoint, new_model, save_checkpoint
from longclip.errors import CheckpointError
from longclip.images import CLIP_STD, ImageTransform
from tests.support.places import ROOT
from tests.support.tiny_clip import tiny_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "clip"
    save_checkpoint(new_model(tiny_config(77)), path, {"origin": "test"})
    return path


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(directory, tmp_path / "clip")


def change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def removed(state: dict[str, torch.Tensor], name: str) -> None:
    del state[name]


def renamed(state: dict[str, torch.Tensor], name: str) -> None:
    state[f"{name}_2"] = state.pop(name)


def resized(state: dict[str, torch.Tensor], name: str) -> None:
    state[name] = torch.zeros(*state[name].shape, 2)


def filled(value: float) -> Callable[[dict[str, torch.Tensor], str], None]:
    def fill(state: dict[str, torch.Tensor], name: str) -> None:
        state[name].view(-1)[-1] = value

    return fill


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), damage=st.sampled_from([removed, renamed, resized, filled(math.nan), filled(-math.inf)]))
def test_damaged_weights_are_refused_by_name(
    directory: Path, copy: Path, data: st.DataObject, damage: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    state = load_file(directory / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(state)))
    damage(state, name)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weights .*: {name}"):
        load_checkpoint(copy)


def test_a_missing_tower_is_refused(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As in a directory of `CLIPForImageClassification`."""
    state = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in state.items() if "vision" in k}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\d\d weights are missing: logit_scale, text_model\.\S+, text_model"):
        load_checkpoint(copy)
    assert "LOAD REPORT" not in capfd.readouterr().err, "one line says it"


def test_without_a_tokenizer_the_packaged_one_is_used(directory: Path, copy: Path) -> None:
    for name in TOKENIZER_FILES:
        (copy / name).unlink()
    expected = load_checkpoint(directory).tokenizer("A naïve dog.")["input_ids"]
    tokenizer = load_checkpoint(copy).tokenizer
    assert tokenizer("A naïve dog.")["input_ids"] == expected
    assert tokenizer.model_max_length == 77


@pytest.mark.parametrize("tokenizer", ["absent", "of another size"])
def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: str, tmp_path: Path) -> None:
    config = tiny_config(77)
    if tokenizer == "absent":
        config.text_config.vocab_size = 500
    checkpoint = new_model(config)
    if tokenizer == "of another size":
        checkpoint.tokenizer.add_tokens(["<one-more>"])
    save_checkpoint(checkpoint, tmp_path / "clip", {})
    if tokenizer == "absent":
        for name in TOKENIZER_FILES:
            (tmp_path / "clip" / name).unlink()
    with pytest.raises(
        CheckpointError, match=r"its tokenizer has \d+ tokens, its embedding has \d+; add the tokenizer"
    ):
        load_checkpoint(tmp_path / "clip")


@pytest.mark.parametrize(
    ("changes", "transform"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, ImageTransform(32, (0.5,) * 3, (0.25,) * 3)),
        ({"do_normalize": False}, ImageTransform(32, (0.0,) * 3, (1.0,) * 3)),
        ({"size": 32, "crop_size": 32, "image_processor_type": None}, ImageTransform(32)),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": None}, ImageTransform(32)),
        ({"rescale_factor": 0.003921568627, "do_pad": False}, ImageTransform(32)),
    ],
)
def test_image_processors_are_honoured(changes: dict[str, Any], transform: ImageTransform, copy: Path) -> None:
    change_json(copy / "preprocessor_config.json", changes)
    assert load_checkpoint(copy).transform == transform


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 2},
        {"size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 40}},
        {"size": None},
        {"crop_size": {"height": 32, "width": 24}},
        {"do_center_crop": False},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_pad": True},
        {"rescale_factor": 0.5},
        {"image_std": [0.0, *CLIP_STD[:2]]},
        {"image_mean": [0.5]},
        {"image_processor_type": "SiglipImageProcessor"},
    ],
)
def test_other_image_processors_are_refused(changes: dict[str, Any], copy: Path) -> None:
    change_json(copy / "preprocessor_config.json", changes)
    with pytest.raises(CheckpointError, match=f"its image processor has .*{next(iter(changes))} = "):
        load_checkpoint(copy)


def test_a_processor_config_takes_precedence(copy: Path) -> None:
    """Newer releases of transformers save the image processor inside the processor."""
    saved = json.loads((copy / "preprocessor_config.json").read_text())
    content = {"processor_class": "CLIPProcessor", "image_processor": saved | {"image_mean": [0.5] * 3}}
    (copy / "processor_config.json").write_text(json.dumps(content))
    assert load_checkpoint(copy).transform.mean == (0.5,) * 3


def test_the_image_processor_of_a_hub_name_is_honoured(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as the hub client leaves it, and no network."""
    cache = tmp_path / "hub" / "models--someone--clip"
    transform = ImageTransform(32, (0.5,) * 3, (0.5,) * 3)
    model = Checkpoint(tiny_checkpoint.model, tiny_checkpoint.tokenizer, transform)
    save_checkpoint(model, cache / "snapshots" / ("0" * 40), {})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    command = [sys.executable, "-m", "longclip.convert", "someone/clip", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    assert load_checkpoint(tmp_path / "out").transform == transform
