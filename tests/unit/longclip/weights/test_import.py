"""Import of what was exported: every pair of formats bit for bit, and whatever is none of them in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, SiglipConfig, SiglipModel

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.convert import main
from longclip.errors import CheckpointError, ConfigError
from longclip.export import export_checkpoint
from longclip.weights.formats import FORMATS
from longclip.weights.reading import convert_checkpoint, read_source
from tests.support.exported_models import random_clip, small_config
from tests.support.weights import failure, same_weights

LONG_FORMATS = [name for name in FORMATS if name != "openai"]


@pytest.fixture(scope="module")
def exported(small_long_clip: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Long-CLIP in every format, named after it."""
    folder = tmp_path_factory.mktemp("exported")
    for name in LONG_FORMATS:
        export_checkpoint(small_long_clip, name, folder / name)
    return folder


def image_tower(name: str, base: Path) -> Path | None:
    return base if name == "text-encoder" else None


@pytest.mark.parametrize("name", LONG_FORMATS)
def test_formats_are_detected_by_content(name: str, exported: Path, small_long_clip_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "renamed.bin"
    (shutil.copytree if (exported / name).is_dir() else shutil.copy)(exported / name, source)
    conversion = read_source(source, image_tower=image_tower(name, small_long_clip_dir))
    assert conversion.source_format == name


@pytest.mark.parametrize("second", LONG_FORMATS)
@pytest.mark.parametrize("first", LONG_FORMATS)
def test_every_pair_of_formats_is_bit_equal(
    first: str, second: str, exported: Path, small_long_clip: Checkpoint, small_long_clip_dir: Path, tmp_path: Path
) -> None:
    between = convert_checkpoint(exported / first, image_tower=image_tower(first, small_long_clip_dir))
    export_checkpoint(between, second, tmp_path / "second")
    checkpoint = convert_checkpoint(tmp_path / "second", image_tower=image_tower(second, small_long_clip_dir))
    assert same_weights(checkpoint, small_long_clip.model.state_dict())
    assert checkpoint.transform == small_long_clip.transform
    assert checkpoint.context_length == checkpoint.tokenizer.model_max_length == 248
    before, after = small_long_clip.model.config, checkpoint.model.config
    assert after.text_config.num_attention_heads == before.text_config.num_attention_heads
    assert after.vision_config.num_attention_heads == before.vision_config.num_attention_heads
    assert after.text_config.hidden_act == after.vision_config.hidden_act == before.text_config.hidden_act


def test_round_trip_of_the_official_file(exported: Path, tmp_path: Path) -> None:
    export_checkpoint(convert_checkpoint(exported / "long-clip"), "long-clip", tmp_path / "again.pt")
    first, again = (torch.load(path, weights_only=True) for path in (exported / "long-clip", tmp_path / "again.pt"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


# --- a text encoder alone ---


def test_text_encoder_completes_another_clip(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = random_clip(small_config(77), seed=9)
    save_checkpoint(other, tmp_path / "other", {})
    source = str(exported / "text-encoder")
    assert main([source, str(tmp_path / "out"), "--image-tower", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.startswith("text-encoder -> ")
    checkpoint = convert_checkpoint(tmp_path / "out")
    assert checkpoint.context_length == 248
    assert same_weights(checkpoint, {**other.model.state_dict(), **load_file(source)})


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoder_of_a_diffusers_pipeline(
    kind: Any, small_long_clip: Checkpoint, small_long_clip_dir: Path, tmp_path: Path
) -> None:
    """Of Stable Diffusion it has no projection, and no `text_model.` before its names; of SDXL's second it has both."""
    encoder = kind.from_pretrained(small_long_clip_dir)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.mul_(1.5)
    encoder.save_pretrained(tmp_path / "text_encoder")
    base = small_long_clip.model
    trained = {name: tensor for name, tensor in base.state_dict().items() if name.startswith("text_model.")}
    if kind is CLIPTextModelWithProjection:
        trained["text_projection.weight"] = base.text_projection.weight
    expected = base.state_dict() | {name: tensor.detach() * 1.5 for name, tensor in trained.items()}
    for source in (tmp_path / "text_encoder", tmp_path / "text_encoder" / "model.safetensors"):
        checkpoint = convert_checkpoint(source, image_tower=small_long_clip_dir)
        assert same_weights(checkpoint, expected)


def test_config_next_to_a_text_encoder(exported: Path, small_long_clip_dir: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "text-encoder", tmp_path / "model.safetensors")
    config = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = convert_checkpoint(tmp_path, image_tower=small_long_clip_dir)
    assert checkpoint.model.config.text_config.num_attention_heads == 4
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match=r"activation gelu, the CLIP of --image-tower quick_gelu"):
        convert_checkpoint(tmp_path, image_tower=small_long_clip_dir)


def test_image_tower_option_is_checked(
    exported: Path, small_long_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = failure(capsys, exported / "text-encoder", tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert "text encoder alone; name the CLIP" in message
    for whole in ("long-clip", "onnx"):
        status, message = failure(capsys, exported / whole, tmp_path / "out", "--image-tower", small_long_clip_dir)
        assert status == ConfigError.exit_code
        assert "is a whole CLIP; --image-tower only completes a text encoder" in message
    wider = small_config(77)
    wider.projection_dim = 16
    save_checkpoint(random_clip(wider), tmp_path / "wider", {})
    status, message = failure(capsys, exported / "text-encoder", tmp_path / "out", "--image-tower", tmp_path / "wider")
    assert status == CheckpointError.exit_code
    assert "weight visual_projection.weight has shape (16, 128)" in message


# --- damaged and foreign ---


@pytest.mark.parametrize("name", LONG_FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.0001])
def test_truncated_files_are_one_line(
    name: str, kept: float, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    (shutil.copytree if (exported / name).is_dir() else shutil.copy)(exported / name, source)
    files = [source] if source.is_file() else list(source.rglob("*.safetensors"))
    assert len(files) == 1
    content = files[0].read_bytes()
    files[0].write_bytes(content[: int(len(content) * kept)])
    status, message = failure(capsys, source, tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert str(source) in message
    assert not (tmp_path / "out").exists()


def test_graphs_without_weights_are_rejected(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = failure(capsys, exported / "onnx" / "text.onnx", tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert "ONNX graph" in message
    assert "give the directory" in message
    (tmp_path / "graphs").mkdir()
    shutil.copy(exported / "onnx" / "text.onnx", tmp_path / "graphs")
    assert "holds no weights" in failure(capsys, tmp_path / "graphs", tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ("[]", "no module"),
        ("{", "cannot make sense of"),
        ('[{"type": "a.CLIPModel"}]', "cannot make sense of"),
        ('[{"type": "a.CLIPModel", "path": "0"}, {"type": "a.Dense", "path": "1"}]', "Dense after its first module"),
        ('[{"type": "a.CLIPModel", "path": 0}]', "cannot make sense of"),
        ('[{"type": "a.CLIPModel", "path": "0"}]', "holds no weights"),
        ('[{"type": "a.CLIPModel", "path": "0/.."}]', "elsewhere"),
        ('[{"type": "a.CLIPModel", "path": "/tmp"}]', "elsewhere"),
    ],
)
def test_other_sentence_transformers(
    modules: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source" / "0").mkdir(parents=True)
    (tmp_path / "source" / "modules.json").write_text(modules)
    status, message = failure(capsys, tmp_path / "source", tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert reason in message


def test_siglip_is_refused_with_the_reason(
    small_long_clip: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 100}, vision_config={**tower, "image_size": 16, "patch_size": 8}
    )
    SiglipModel(config).save_pretrained(tmp_path / "siglip")
    shutil.copy(tmp_path / "siglip" / "model.safetensors", tmp_path / "loose.safetensors")

    export_checkpoint(small_long_clip, "open_clip", tmp_path / "open_clip")
    path = tmp_path / "open_clip" / "open_clip_config.json"
    saved = json.loads(path.read_text())
    saved["model_cfg"] |= {"init_logit_bias": -10}
    saved["model_cfg"]["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last"}
    path.write_text(json.dumps(saved))

    for source in ("siglip", "loose.safetensors", "open_clip"):
        status, message = failure(capsys, tmp_path / source, tmp_path / "out")
        assert status == CheckpointError.exit_code
        assert "a SigLIP model is not a CLIP model" in message
        assert "both directions" in message


def test_other_preprocessing_of_open_clip_is_refused(small_long_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(small_long_clip, "open_clip", tmp_path / "open_clip")
    path = tmp_path / "open_clip" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"shortest"', '"squash"'))
    with pytest.raises(CheckpointError, match=r"preprocess_cfg\.resize_mode = 'squash'"):
        convert_checkpoint(tmp_path / "open_clip")
