"""What a checkpoint says of its origin: read back as written, and never guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from longclip.checkpoint import Checkpoint, checkpoint_directory, checkpoint_id, save_checkpoint
from longclip.files import MANIFEST
from longclip.lineage import Lineage, model_name, read_lineage


def write_metadata(directory: Path, metadata: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).write_text(json.dumps({"metadata": metadata}))
    return directory


def test_a_checkpoint_keeps_its_lineage_and_its_id(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    lineage = Lineage(run_id="a1", data_digest="b2", data_digest_of="manifest", base="clip", code_version="0.1.0")
    save_checkpoint(tiny_checkpoint, tmp_path / "clip", {"step": 3, **lineage.metadata()})
    assert read_lineage(tmp_path / "clip") == lineage
    manifest = json.loads((tmp_path / "clip" / MANIFEST).read_text())
    assert manifest["checkpoint_id"] == checkpoint_id(tmp_path / "clip")
    assert manifest["metadata"]["lineage"]["run_id"] == "a1"
    assert manifest["metadata"]["lineage"]["git_commit"] is None


@pytest.mark.parametrize(
    "metadata",
    [{"origin": "test"}, {}, None, [], {"lineage": None}, {"lineage": "a1"}, {"lineage": {"run_id": 7, "other": "x"}}],
)
def test_what_is_not_recorded_is_none(tmp_path: Path, metadata: Any) -> None:
    assert read_lineage(write_metadata(tmp_path, metadata)) == Lineage()
    assert model_name(tmp_path) == tmp_path.name


def test_directories_without_a_manifest_have_no_lineage(tmp_path: Path) -> None:
    assert read_lineage(tmp_path) == Lineage()
    (tmp_path / MANIFEST).write_text("{")
    assert read_lineage(tmp_path) == Lineage()


@pytest.mark.parametrize(
    ("directory", "metadata", "name"),
    [
        ("run1/checkpoint", {"settings": {"output": "/data/fine-tuned"}}, "fine-tuned"),
        ("checkpoint", {"origin": "convert", "source": "longclip-B.pt"}, "longclip-B.pt"),
        ("checkpoint", {"source": "openai/clip-vit-base-patch16"}, "openai/clip-vit-base-patch16"),
        ("run1/checkpoint", {"settings": None}, "run1"),
        ("clip-b16", {}, "clip-b16"),
    ],
)
def test_models_are_named_by_what_made_them(tmp_path: Path, directory: str, metadata: Any, name: str) -> None:
    assert model_name(write_metadata(tmp_path / directory, metadata)) == name


def test_weights_in_several_files_have_an_id_of_their_own(tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    ids = set()
    for content in (b"one", b"other"):
        for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
            (tmp_path / name).write_bytes((tiny_checkpoint_dir / name).read_bytes())
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"same")
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(content)
        ids.add(checkpoint_id(tmp_path))
    assert len(ids) == 2


def test_a_hub_name_leads_to_the_directory_of_its_files(
    tmp_path: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint_directory(tiny_checkpoint_dir) == tiny_checkpoint_dir
    monkeypatch.setattr("longclip.checkpoint.cached_file", lambda source, name: f"{tmp_path}/{source}/{name}")
    assert checkpoint_directory("openai/clip") == tmp_path / "openai" / "clip"
