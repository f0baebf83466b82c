"""Export: what is written, what comes back of it, what a format cannot hold, and the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig

from longclip.checkpoint import Checkpoint
from longclip.errors import CheckpointError, ConfigError
from longclip.export import export_checkpoint, main
from longclip.stretch import stretch_checkpoint
from longclip.weights.formats import FORMATS
from longclip.weights.layouts import to_huggingface
from longclip.weights.openai import to_openai
from longclip.weights.reading import convert_checkpoint
from tests.support.exported_models import random_clip, small_config
from tests.support.weights import openai_state, same_weights


def edited(edit: Callable[[CLIPConfig], None], context_length: int = 248) -> Checkpoint:
    """A small CLIP of a configuration that differs from OpenAI's in one thing."""
    config = small_config(context_length)
    edit(config)
    return random_clip(config)


def test_openai_names_are_the_inverse_of_hugging_face_names() -> None:
    state = openai_state()
    back = to_openai(to_huggingface(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_official_stretch_in_official_layout(vectors: Path, tmp_path: Path) -> None:
    base = load_file(vectors / "openai_tiny_clip.safetensors")
    for number in ("input_resolution", "context_length", "vocab_size"):  # ignored by the official loaders
        del base[number]
    official = load_file(vectors / "official_longclip_tiny.safetensors")
    stretched = stretch_checkpoint(convert_checkpoint(vectors / "openai_tiny_clip.safetensors"))
    export_checkpoint(stretched, "long-clip", tmp_path / "long.pt")
    state = torch.load(tmp_path / "long.pt", weights_only=True)
    assert state.keys() == {*base, "positional_embedding_res"}
    for name, tensor in base.items():
        if name != "positional_embedding":
            assert torch.equal(state[name].reshape(tensor.shape), tensor.float())
    for table in ("positional_embedding", "positional_embedding_res"):
        torch.testing.assert_close(state[table], official["stretched_positional_embedding"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fixture", ["small_clip", "small_long_clip"])
@pytest.mark.parametrize("first", ["official", "open_clip"])
@pytest.mark.parametrize("second", ["official", "open_clip"])
def test_pairs_of_formats(
    fixture: str, first: str, second: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    official = {"small_clip": "openai", "small_long_clip": "long-clip"}[fixture]
    formats = [name.replace("official", official) for name in (first, second)]
    assert_round_trip(request.getfixturevalue(fixture), formats, tmp_path)


def assert_round_trip(checkpoint: Checkpoint, formats: list[str], folder: Path) -> None:
    """Weights, configuration, transform and context length are the same after every one of the formats in turn."""
    current = checkpoint
    for number, name in enumerate(formats):
        export_checkpoint(current, name, folder / str(number))
        current = convert_checkpoint(folder / str(number))
        assert same_weights(current, checkpoint.model.state_dict())
        assert current.transform == checkpoint.transform
        assert current.context_length == current.tokenizer.model_max_length == checkpoint.context_length
        for tower in ("text_config", "vision_config"):
            before, after = (getattr(model.model.config, tower) for model in (checkpoint, current))
            for key in ("hidden_act", "num_attention_heads", "intermediate_size", "num_hidden_layers"):
                assert getattr(after, key) == getattr(before, key)


def _set(tower: str, **values: object) -> Callable[[CLIPConfig], None]:
    def edit(config: CLIPConfig) -> None:
        for key, value in values.items():
            setattr(getattr(config, tower), key, value)

    return edit


@pytest.mark.parametrize("context_length", [77, 124, 248, 305])
def test_open_clip_stores_any_length_and_towers(context_length: int, tmp_path: Path) -> None:
    """Heads of 32, MLPs of another width, towers of different depth, 50-pixel images in patches of 8."""
    config = small_config(context_length, activation="gelu")
    _set("text_config", num_attention_heads=2, intermediate_size=200, num_hidden_layers=1)(config)
    _set("vision_config", num_attention_heads=4, intermediate_size=100, image_size=50)(config)
    assert_round_trip(random_clip(config), ["open_clip"], tmp_path)


def test_heads_of_the_official_code_are_64_wide_at_any_width(tmp_path: Path) -> None:
    wide = edited(_set("vision_config", hidden_size=1280, intermediate_size=5120, num_attention_heads=20))
    assert_round_trip(wide, ["long-clip", "open_clip"], tmp_path)


LIMITS: dict[str, tuple[str, Callable[[], Checkpoint], str]] = {
    "long openai": ("openai", lambda: random_clip(small_config(248)), "248 text positions.*only hold 77.*long-clip"),
    "short long-clip": ("long-clip", lambda: random_clip(small_config(77)), "77 text positions.*only hold 248"),
    "gelu": ("long-clip", lambda: random_clip(small_config(248, "gelu")), "activation gelu.*quick_gelu"),
    "heads": ("long-clip", lambda: edited(_set("text_config", num_attention_heads=4)), "4 attention heads.*text tower"),
    "MLP": ("long-clip", lambda: edited(_set("vision_config", intermediate_size=100)), "width 100.*image tower.*512"),
    "pixels": ("long-clip", lambda: edited(_set("vision_config", image_size=50)), "50 pixels in patches of 8"),
    "open_clip's width": (
        "openai",
        lambda: edited(
            _set("vision_config", hidden_size=1280, intermediate_size=5120, num_attention_heads=20), context_length=77
        ),
        "width 1280.*heads of 80",
    ),
    "two activations": ("open_clip", lambda: edited(_set("vision_config", hidden_act="gelu")), "one activation"),
    "activation": (
        "open_clip",
        lambda: random_clip(small_config(248, "relu")),
        "activation relu.*quick_gelu or gelu",
    ),
    "epsilon": ("open_clip", lambda: edited(_set("text_config", layer_norm_eps=1e-6)), "layer_norm_eps 1e-06"),
    "end token": ("open_clip", lambda: edited(_set("text_config", eos_token_id=5)), "ends texts with 5.*49407"),
    "text encoder": (
        "text-encoder",
        lambda: edited(
            _set("text_config", num_hidden_layers=12, hidden_size=768, num_attention_heads=12, hidden_act="gelu")
        ),
        "gelu in a text tower of the shape of CLIP-L",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_models_that_a_format_cannot_store(case: str, tmp_path: Path) -> None:
    name, make, message = LIMITS[case]
    with pytest.raises(CheckpointError, match=rf"^format '{name}': .*{message}"):
        export_checkpoint(make(), name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command_line(small_long_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small_long_clip_dir), "--to", "open_clip", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("huggingface -> open_clip: 248 positions, 2 files, ")
    assert f'create_model_and_transforms("local-dir:{tmp_path / "out"}")' in out
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 32
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644


def test_existing_files_are_not_replaced(
    small_long_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.pt").write_text("years of work")
    status = main([str(small_long_clip_dir), "--to", "long-clip", str(tmp_path / "thesis.pt")])
    assert status == ConfigError.exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: destination ")
    assert captured.err.count("\n") == 1
    assert (tmp_path / "thesis.pt").read_text() == "years of work"
    with pytest.raises(ConfigError, match="format 'onnxx' is unknown"):
        export_checkpoint(convert_checkpoint(small_long_clip_dir), "onnxx", tmp_path / "out")


def test_full_disk_leaves_no_files(
    small_long_clip: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    monkeypatch.setattr("longclip.weights.open_clip.save_file", no_space)
    for name in ("long-clip", "open_clip"):
        with pytest.raises(OSError, match="No space"):
            export_checkpoint(small_long_clip, name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_errors_for_other_models_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.pt"), "--to", "openai", str(tmp_path / "out.pt")]) == CheckpointError.exit_code
    assert capsys.readouterr().err == f"error: weights '{tmp_path / 'no.pt'}': no such file\n"


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*FORMATS, "examples", "exit status"))


def test_error_names_the_extra_in_one_line(
    small_long_clip: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime, which is not installed.*pip install 'longclip\[onnx\]'"):
        export_checkpoint(small_long_clip, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_graphs_that_compute_something_else_are_not_published(
    small_long_clip: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longclip.weights.onnx.TOLERANCE", 0.0)
    with pytest.raises(CheckpointError, match=r"text\.onnx: onnxruntime's embeddings .* differ"):
        export_checkpoint(small_long_clip, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
