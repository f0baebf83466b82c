"""Models given as weights files: converted once, and never with a guess that nobody is told of."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from longclip.checkpoint import load_checkpoint
from longclip.errors import CheckpointError, ConfigError
from longclip.files import MANIFEST
from pipelines.registry.model_cache import local_model
from tests.support.weights import DIM, WIDTH, openai_state


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(openai_state(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def activation_of(directory: str) -> str:
    return load_checkpoint(directory).model.config.text_config.hidden_act


def write_open_clip_config(folder: Path, quick_gelu: bool) -> None:
    tower = {"width": WIDTH, "layers": 1}
    model = {
        "embed_dim": DIM,
        "quick_gelu": quick_gelu,
        "vision_cfg": tower | {"image_size": 16, "patch_size": 8, "head_width": 16},
        "text_cfg": tower | {"context_length": 77, "heads": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))


def test_an_assumed_activation_is_told_and_recorded_every_time(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        directory = local_model(str(weights), tmp_path / "cache", "")
        assert f"warning: '{weights}' does not say its activation; quick_gelu is assumed" in capsys.readouterr().err
    assert json.loads((Path(directory) / MANIFEST).read_text())["metadata"]["assumed_activation"] == "quick_gelu"


def test_the_setting_or_a_config_decides_the_activation(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the same weights were converted before."""
    local_model(str(weights), tmp_path / "cache", "")
    capsys.readouterr()
    assert activation_of(local_model(str(weights), tmp_path / "cache", "", "gelu")) == "gelu"
    write_open_clip_config(tmp_path, quick_gelu=False)
    assert activation_of(local_model(str(weights), tmp_path / "cache", "")) == "gelu"
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="activation 'quick_gelu' contradicts"):
        local_model(str(weights), tmp_path / "cache", "", "quick_gelu")


def test_a_damaged_conversion_is_refused(weights: Path, tmp_path: Path) -> None:
    directory = Path(local_model(str(weights), tmp_path / "cache", ""))
    (directory / "config.json").write_text((directory / "config.json").read_text().replace("quick_gelu", "gelu"))
    with pytest.raises(CheckpointError, match="is not what was written"):
        local_model(str(weights), tmp_path / "cache", "")
