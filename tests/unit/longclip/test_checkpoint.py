"""Checkpoints: what is written is read again, whole or not at all, and nothing else is taken for a CLIP."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, CLIPConfig, CLIPModel, CLIPTokenizer

from longclip import checkpoint as module
from longclip import files
from longclip.checkpoint import (
    MANIFEST,
    Checkpoint,
    checkpoint_id,
    file_sha256,
    load_checkpoint,
    new_model,
    save_checkpoint,
)
from longclip.errors import CheckpointError
from longclip.images import ImageTransform
from tests.support.tiny_clip import tiny_config


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_round_trip(tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path) -> None:
    loaded = load_checkpoint(tiny_checkpoint_dir)
    saved_weights, weights = tiny_checkpoint.model.state_dict(), loaded.model.state_dict()
    assert weights.keys() == saved_weights.keys()
    assert all(torch.equal(weights[name], saved_weights[name]) for name in weights)
    assert loaded.transform == tiny_checkpoint.transform
    assert loaded.context_length == loaded.tokenizer.model_max_length == 248
    text = "Two dogs, naïve café 🐕"
    assert loaded.tokenizer(text)["input_ids"] == tiny_checkpoint.tokenizer(text)["input_ids"]
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_custom_normalisation_is_kept(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    transform = ImageTransform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    save_checkpoint(Checkpoint(tiny_checkpoint.model, tiny_checkpoint.tokenizer, transform), tmp_path / "a", {})
    assert load_checkpoint(tmp_path / "a").transform == transform


def test_plain_transformers_loads_it(tiny_checkpoint_dir: Path) -> None:
    assert CLIPModel.from_pretrained(tiny_checkpoint_dir).config.text_config.max_position_embeddings == 248
    assert CLIPTokenizer.from_pretrained(tiny_checkpoint_dir).model_max_length == 248


def test_manifest(tiny_checkpoint_dir: Path) -> None:
    manifest = json.loads((tiny_checkpoint_dir / MANIFEST).read_text())
    assert manifest["metadata"] == {"origin": "test"}
    assert (manifest["context_length"], manifest["embedding_dim"]) == (248, 24)
    others = {file.name for file in tiny_checkpoint_dir.iterdir()} - {MANIFEST}
    assert "model.safetensors" in others
    assert manifest["sha256"] == {name: file_sha256(tiny_checkpoint_dir / name) for name in others}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", b"quick_gelu", b"gelu"),
        ("tokenizer.json", b'"dog"', b'"dgo"'),
        ("preprocessor_config.json", b"0.4", b"0.5"),
        ("model.safetensors", b"", b"\0"),
    ],
)
def test_checkpoint_id_depends_on_what_is_computed(
    file: str, old: bytes, new: bytes, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        save_checkpoint(tiny_checkpoint, tmp_path / name, {"run": name})
    assert checkpoint_id(tmp_path / "a") == checkpoint_id(tmp_path / "b")
    path = tmp_path / "b" / file
    content = path.read_bytes()
    path.write_bytes(content.replace(old, new) if old else content + new)
    assert path.read_bytes() != content
    assert checkpoint_id(tmp_path / "a") != checkpoint_id(tmp_path / "b")


def test_checkpoint_replaces_an_earlier_one_completely(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a"
    save_checkpoint(tiny_checkpoint, target, {"run": 1})
    (target / "stale").write_text("of the earlier one")
    save_checkpoint(tiny_checkpoint, target, {"run": 2})
    assert json.loads((target / MANIFEST).read_text())["metadata"] == {"run": 2}
    assert not (target / "stale").exists()
    assert [path.name for path in target.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("failing", ["weights", "tokenizer", "manifest", "publish"])
def test_failed_save_leaves_no_files(
    failing: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    save_checkpoint(tiny_checkpoint, target, {"run": 1})
    before = contents(target)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    def half_written(directory: Path, **_: object) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        fail()

    with monkeypatch.context() as patch:
        if failing == "weights":
            patch.setattr(tiny_checkpoint.model, "save_pretrained", half_written)
        elif failing == "tokenizer":
            patch.setattr(type(tiny_checkpoint.tokenizer), "save_pretrained", fail)
        elif failing == "manifest":
            patch.setattr(module, "file_sha256", fail)
        else:
            patch.setattr(files, "publish_directory", fail)
        for directory in (target, tmp_path / "new"):
            with pytest.raises(OSError, match="no space"):
                save_checkpoint(tiny_checkpoint, directory, {"run": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert contents(target) == before


def test_metadata_that_is_not_json_leaves_no_files(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tiny_checkpoint, tmp_path / "a", {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_new_models_are_reproducible() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(new_model(tiny_config(77)).model.text_projection.weight)
    assert torch.equal(*weights)
    checkpoint = new_model(tiny_config(77))
    assert checkpoint.tokenizer.model_max_length == 77
    assert checkpoint.transform == ImageTransform(32)


@pytest.mark.parametrize("absolute", [True, False])
def test_error_for_missing_paths(absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(tmp_path / "none") if absolute else "./none"
    with pytest.raises(CheckpointError, match="does not exist") as error:
        load_checkpoint(source)
    assert source in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_pointed_to_the_converter(tmp_path: Path) -> None:
    (tmp_path / "ViT.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a file.*longclip\.convert"):
        load_checkpoint(tmp_path / "ViT.pt")


def test_other_models_are_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'bert'.*not a CLIP"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("config.json", None, "config"),
        ("config.json", b"{", "config"),
        ("model.safetensors", None, "weights"),
        ("model.safetensors", b"cut", "weights"),
        ("tokenizer.json", b"{", "tokenizer"),
    ],
)
def test_damaged_checkpoints(
    file: str, content: bytes | None, part: str, tiny_checkpoint_dir: Path, tmp_path: Path
) -> None:
    for name, data in contents(tiny_checkpoint_dir).items():
        if name != file:
            (tmp_path / name).write_bytes(data)
        elif content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=part) as error:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_match_their_config(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    for name, data in contents(tiny_checkpoint_dir).items():
        (tmp_path / name).write_bytes(data)
    config = CLIPConfig.from_pretrained(tmp_path)
    config.text_config.max_position_embeddings = 77
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="weights"):
        load_checkpoint(tmp_path)


def test_missing_processor_config_gives_the_constants_of_clip(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    for name, data in contents(tiny_checkpoint_dir).items():
        if name != "preprocessor_config.json":
            (tmp_path / name).write_bytes(data)
    assert load_checkpoint(tmp_path).transform == ImageTransform(32)
