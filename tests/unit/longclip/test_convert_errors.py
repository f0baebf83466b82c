"""Conversion of foreign weights that must be refused: with one line, and without running what is in them."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig

from longclip.checkpoint import load_checkpoint
from longclip.convert import main
from longclip.errors import CheckpointError, ConfigError, LongClipError
from longclip.weights.reading import convert_checkpoint
from tests.support.places import ROOT
from tests.support.weights import WIDTH, State, failure


class _RunsCode:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class _ScriptRunsCode(nn.Module):
    """Loaded by `torch.jit.load`, it leaves a file in the current directory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.zeros(2)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.w, False)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.w = state[0]
        self.training = False
        torch.save(torch.ones(2), "trace-of-code")


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_with_code_are_rejected_without_running_it(
    legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": _RunsCode(tmp_path / "trace")}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    status, message = failure(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert "refused" in message
    assert "weights_only" not in message
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(_ScriptRunsCode()).save("a.pt")
    assert failure(capsys, "a.pt", "out")[0] == CheckpointError.exit_code
    assert not Path("trace-of-code").exists()
    torch.jit.load("a.pt")  # the attack is real
    assert Path("trace-of-code").exists()


def test_pickle_inside_torchscript_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps(_RunsCode(tmp_path / "trace")))
    assert "refused" in failure(capsys, tmp_path / "a.pt", tmp_path / "out")[1]
    assert not (tmp_path / "trace").exists()


def _without(state: State, name: str) -> State:
    return {other: tensor for other, tensor in state.items() if other != name}


STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "something else": (lambda s: {"layer.weight": torch.zeros(2)}, "not those of a CLIP.*layer.weight"),
    "missing weight": (lambda s: _without(s, "visual.ln_pre.bias"), r"1 weights are missing: visual\.ln_pre\.bias"),
    "unknown weights": (lambda s: {**s, "logit_bias": torch.zeros(1)}, "not part of a CLIP: logit_bias"),
    "ResNet": (lambda s: {**s, "visual.layer1.0.conv1.weight": torch.zeros(1)}, "ResNet"),
    "timm tower": (lambda s: {**s, "visual.trunk.norm.weight": torch.zeros(1)}, "timm"),
    "wrong shape": (lambda s: {**s, "ln_final.bias": torch.zeros(5)}, r"final_layer_norm\.bias.*\(5,\)"),
    "scalar weight": (lambda s: {**s, "text_projection": torch.zeros(())}, "text_projection"),
    "odd in_proj": (
        lambda s: {**s, "transformer.resblocks.0.attn.in_proj_bias": torch.zeros(7)},
        "does not have three parts",
    ),
    "no square grid": (lambda s: {**s, "visual.positional_embedding": torch.zeros(7, WIDTH)}, "not a square grid"),
    "other vocabulary": (lambda s: {**s, "token_embedding.weight": torch.zeros(100, WIDTH)}, "100 tokens"),
    "odd second table": (lambda s: {**s, "positional_embedding_res": torch.zeros(248, WIDTH)}, "differ"),
    "PE-Core": (lambda s: {**s, "visual.attn_pool.probe": torch.zeros(1)}, "pools with attention, as that of PE-Core"),
    "SigLIP": (
        lambda s: {**s, "visual.attn_pool.probe": torch.zeros(1), "logit_bias": torch.zeros(1)},
        "SigLIP model is not a CLIP",
    ),
    "NaN": (lambda s: {**s, "ln_final.bias": torch.full((WIDTH,), torch.nan)}, r"NaN or infinite.*final_layer_norm"),
    "no layers": (lambda s: {n: t for n, t in s.items() if "resblocks" not in n}, "missing"),
}


@pytest.mark.parametrize("case", STATES)
def test_weights_of_other_models(case: str, openai: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, message = STATES[case]
    save_file(edit(openai), tmp_path / "a.safetensors")
    status = main([str(tmp_path / "a.safetensors"), str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert status == CheckpointError.exit_code
    assert "a.safetensors" in captured.err
    assert captured.err.count("\n") == 1
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "a.safetensors")


def _cut(path: Path, save: Callable[[Path], None], size: float) -> None:
    save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * size)])


SMALL = {"w": torch.zeros(1000)}
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda path: None, "no such file"),
    "text": (lambda path: path.write_text("<html>Sign in to download</html>"), "not a weights file"),
    "empty": (lambda path: path.write_bytes(b""), "not a weights file"),
    "LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "cut safetensors": (lambda path: _cut(path, lambda p: save_file(SMALL, p), 0.5), "safetensors"),
    "cut safetensors header": (lambda path: _cut(path, lambda p: save_file(SMALL, p), 0.01), "safetensors"),
    "cut zip": (lambda path: _cut(path, lambda p: torch.save(SMALL, p), 0.5), "cut off"),
    "zip of something": (lambda path: _zip(path), "damaged"),
    "a tensor alone": (lambda path: torch.save(torch.zeros(2), path), "does not hold a state dict"),
    "no tensors": (lambda path: torch.save({"epoch": 1}, path), "not those of a CLIP"),
}


def _zip(path: Path) -> None:
    shutil.make_archive(str(path.with_suffix("")), "zip", root_dir=ROOT / "tests", base_dir="conftest.py")
    path.with_suffix(".zip").rename(path)


@pytest.mark.parametrize("case", FILES)
def test_files_without_weights(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, reason = FILES[case]
    write(tmp_path / "a.pt")
    status, message = failure(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert reason in message
    assert "a.pt" in message


@pytest.mark.parametrize("kind", ["one alone", "one missing", "weight missing"])
def test_incomplete_sets_of_weights_files(
    kind: str, openai: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "model-00001-of-00002.safetensors"
    save_file(_without(openai, "ln_final.bias"), shard)
    files = dict.fromkeys(openai, shard.name)
    if kind == "one missing":
        files["ln_final.bias"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": files}))
    status, message = failure(capsys, shard if kind == "one alone" else index, tmp_path / "out")
    assert status == CheckpointError.exit_code
    expected = {
        "one alone": "one of 2 files of a model; give their directory",
        "one missing": "'model-00002-of-00002.safetensors', which it names, is missing",
        "weight missing": "ln_final.bias",
    }
    assert expected[kind] in message


def test_directories_without_a_clip_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    status, message = failure(capsys, tmp_path / "empty", tmp_path / "out")
    assert status == CheckpointError.exit_code
    assert "holds no weights" in message

    BertConfig(hidden_size=8, num_attention_heads=1, vocab_size=10).save_pretrained(tmp_path / "bert")
    for weights in ("model.safetensors", None):
        if weights:
            save_file({"bert.x": torch.zeros(2)}, tmp_path / "bert" / weights)
        status, message = failure(capsys, tmp_path / "bert", tmp_path / "out")
        assert status == CheckpointError.exit_code
        assert "'bert'" in message

    assert "does not exist" in failure(capsys, tmp_path / "no" / "where", tmp_path / "out")[1]


def test_existing_destinations(hugging_face_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for options in ([], ["--overwrite"]):  # even asked to, it replaces nothing but checkpoints
        assert failure(capsys, hugging_face_dir, out, *options)[0] == ConfigError.exit_code
        assert [file.name for file in out.iterdir()] == ["thesis.tex"]

    checkpoint = tmp_path / "checkpoint"
    assert main([str(hugging_face_dir), str(checkpoint)]) == 0
    capsys.readouterr()
    assert "--overwrite" in failure(capsys, hugging_face_dir, checkpoint)[1]
    assert "holds the source" in failure(capsys, checkpoint, checkpoint, "--overwrite")[1]
    assert main([str(hugging_face_dir), str(checkpoint), "--overwrite", "--stretch"]) == 0
    assert load_checkpoint(checkpoint).context_length == 248


def test_unwritable_destination_is_one_line(
    hugging_face_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert failure(capsys, hugging_face_dir, tmp_path / "file" / "out")[0] == LongClipError.exit_code
