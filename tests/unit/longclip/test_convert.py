"""Conversion of foreign weights: every source format, and numbers of the official code."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, CLIPTokenizer

from longclip.checkpoint import MANIFEST, file_sha256, load_checkpoint, new_model, save_checkpoint
from longclip.convert import main
from longclip.errors import CheckpointError, ConfigError
from longclip.stretch import stretch_checkpoint, stretch_positions
from longclip.weights.layouts import bare_names, to_huggingface
from longclip.weights.reading import convert_checkpoint
from longclip.weights.shapes import infer_config
from longclip.weights.tensor_files import read_tensors
from tests.support.tiny_clip import tiny_config
from tests.support.weights import DIM, WIDTH, State, failure, openai_state, same_weights

# --- against the official code ---


@pytest.fixture(scope="module")
def official(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference CLIP, converted and stretched by the command line."""
    target = tmp_path_factory.mktemp("official") / "out"
    assert main([str(vectors / "openai_tiny_clip.safetensors"), str(target), "--stretch"]) == 0
    return target


def test_plain_transformers_reproduces_official_embeddings(official: Path, vectors: Path) -> None:
    expected = load_file(vectors / "official_longclip_tiny.safetensors")
    model = CLIPModel.from_pretrained(official).eval()
    with torch.no_grad():
        text = model.get_text_features(input_ids=expected["text_ids"].long()).pooler_output
        image = model.get_image_features(pixel_values=expected["pixel_values"]).pooler_output
    torch.testing.assert_close(text, expected["text_embeds"], rtol=0, atol=1e-5)
    torch.testing.assert_close(image, expected["image_embeds"], rtol=0, atol=1e-5)


def test_tokenizer_and_processor_load_through_transformers(official: Path, vectors: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(official)
    assert tokenizer.model_max_length == 248
    texts = json.loads((vectors / "official_longclip_tiny.json").read_text())["texts"]
    expected = load_file(vectors / "official_longclip_tiny.safetensors")["text_ids"]
    for text, ids in zip(texts, expected.tolist(), strict=True):
        assert tokenizer(text, truncation=True)["input_ids"] == [token for token in ids if token]
    processor = AutoImageProcessor.from_pretrained(official, backend="pil")
    assert dict(processor.size) == {"shortest_edge": 32}
    assert dict(processor.crop_size) == {"height": 32, "width": 32}


def test_manifest_records_the_origin(official: Path, vectors: Path) -> None:
    metadata = json.loads((official / MANIFEST).read_text())["metadata"]
    assert metadata["source"] == "openai_tiny_clip.safetensors"
    assert metadata["source_sha256"] == file_sha256(vectors / "openai_tiny_clip.safetensors")
    assert metadata["source_format"] == "openai"
    assert metadata["stretch"] == {"source_positions": 77, "kept_positions": 20, "stretch_factor": 4}


# --- formats ---


class _Node(nn.Module):
    """A module that holds weights under dotted names, as TorchScript wants them."""

    def __init__(self, state: State) -> None:
        super().__init__()
        groups: dict[str, State] = {}
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            if rest:
                groups.setdefault(head, {})[rest] = tensor
            elif tensor.is_floating_point():
                self.register_parameter(head, nn.Parameter(tensor))
            else:
                self.register_buffer(head, tensor)
        for head, group in groups.items():
            self.add_module(head, _Node(group))

    def forward(self, x: Tensor) -> Tensor:
        return x


def _module_prefixed(state: State, prefix: str = "module.") -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _save_torchscript(state: State, path: Path) -> None:
    state = {**state, "input_resolution": torch.tensor(16), "vocab_size": torch.tensor(49408)}
    torch.jit.script(_Node(state)).save(path)


def _save_custom_text(state: State, path: Path) -> None:
    """As open_clip's `CustomTextCLIP` names them in a training checkpoint."""
    named = {n if n.startswith(("visual.", "logit_scale")) else f"text.{n}": t for n, t in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": _module_prefixed(named)}, path)


METRICS = {"loss": np.float64(0.5), "best": np.float32(2), "step": np.int64(3), "done": np.bool_(True)}
WRITERS: dict[str, Callable[[State, Path], None]] = {
    "a.safetensors": lambda state, path: save_file({**state, "context_length": torch.tensor(77)}, path),
    "b.pt": lambda state, path: torch.save({**state, "input_resolution": 16, "vocab_size": torch.tensor(49408)}, path),
    "c.bin": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "d.pt": _save_torchscript,
    "e.pth": lambda state, path: torch.save({"state_dict": _module_prefixed(state), "epoch": 1}, path),
    "f.pt": _save_custom_text,
    "g.pt": lambda state, path: save_file(_module_prefixed(state, "module._orig_mod."), path),
    "h.pt": lambda state, path: torch.save({"model_state_dict": state, "args": Namespace(lr=1e-4, out="x")}, path),
    "i.ckpt": lambda state, path: torch.save({"state_dict": _module_prefixed(state, "model.")} | METRICS, path),
    "model.safetensors.index.json": lambda state, path: _save_shards(state, path, "safetensors", save_file),
    "pytorch_model.bin.index.json": lambda state, path: _save_shards(state, path, "bin", torch.save),
}


def _save_shards(state: State, index: Path, suffix: str, save: Callable[[State, Path], None]) -> None:
    names = sorted(state)
    files = [f"model-{number:05d}-of-00002.{suffix}" for number in (1, 2)]
    for file, half in zip(files, (names[::2], names[1::2]), strict=True):
        save({name: state[name] for name in half}, index.parent / file)
    index.write_text(json.dumps({"weight_map": {name: files[place % 2] for place, name in enumerate(names)}}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_weights(name: str, openai: State, tmp_path: Path) -> None:
    WRITERS[name](openai, tmp_path / name)
    checkpoint = convert_checkpoint(tmp_path / name)
    assert same_weights(checkpoint, to_huggingface(openai))
    assert checkpoint.context_length == checkpoint.tokenizer.model_max_length == 77
    assert checkpoint.transform.image_size == 16
    assert not checkpoint.model.training


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_reader_agrees_with_torch(openai: State, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in openai.items() if name != "token_embedding.weight"}
    _save_torchscript(halves, tmp_path / "clip.pt")
    expected = torch.jit.load(tmp_path / "clip.pt").state_dict()
    actual = read_tensors(tmp_path / "clip.pt")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.bin.index.json"])
def test_directories_whose_weights_transformers_does_not_look_for(
    name: str, openai: State, hugging_face_dir: Path, tmp_path: Path
) -> None:
    state = to_huggingface(openai)
    directory = shutil.copytree(hugging_face_dir, tmp_path / "clip")
    (directory / "model.safetensors").unlink()
    WRITERS.get(name, save_file)(state, directory / name)
    assert same_weights(convert_checkpoint(directory), state)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; convert .*`python -m longclip\.convert "):
        load_checkpoint(directory)


def test_half_precision_becomes_float32(openai: State, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in openai.items()}
    save_file(halves, tmp_path / "half.safetensors")
    checkpoint = convert_checkpoint(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in checkpoint.model.parameters()} == {torch.float32}
    assert same_weights(checkpoint, to_huggingface({name: tensor.float() for name, tensor in halves.items()}))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_long_clip_tables_are_merged(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = openai_state(context_length=248)
    state["positional_embedding_res"] = torch.randn(248, WIDTH)
    torch.save(_module_prefixed(state, prefix), tmp_path / "longclip-B.pt")
    assert main([str(tmp_path / "longclip-B.pt"), str(tmp_path / "out")]) == 0
    assert "long-clip ->" in capsys.readouterr().out
    table = load_checkpoint(tmp_path / "out").model.text_model.embeddings.position_embedding.weight
    assert torch.equal(table[:20], state["positional_embedding"][:20])
    assert torch.equal(table[20:], state["positional_embedding_res"][20:])


def test_config_of_openai_layout(openai: State, tmp_path: Path) -> None:
    save_file(openai, tmp_path / "clip.safetensors")
    config = convert_checkpoint(tmp_path / "clip.safetensors").model.config
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.bos_token_id, text.eos_token_id, text.pad_token_id) == (49408, 49406, 49407, 0)
    assert (text.hidden_act, vision.hidden_act) == ("quick_gelu", "quick_gelu")
    assert (vision.image_size, vision.patch_size, config.projection_dim) == (16, 8, DIM)


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (1024, 16), (1280, 16), (1408, 16), (1664, 16)])
def test_head_widths_of_published_models(width: int, heads: int) -> None:
    with torch.device("meta"):
        state = to_huggingface({name: tensor.to("meta") for name, tensor in openai_state(vision_width=width).items()})
    assert infer_config(state, "gelu").vision_config.num_attention_heads == heads


def _open_clip_dir(folder: Path, state: State, quick_gelu: bool | None = None, **vision: object) -> Path:
    model = {
        "embed_dim": DIM,
        "vision_cfg": {"image_size": 16, "width": WIDTH, "layers": 1, "patch_size": 8, "head_width": 8, **vision},
        "text_cfg": {"context_length": 77, "width": WIDTH, "heads": 2, "layers": 1},
    }
    if quick_gelu is not None:
        model["quick_gelu"] = quick_gelu
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize(("quick_gelu", "activation"), [(None, "gelu"), (False, "gelu"), (True, "quick_gelu")])
def test_open_clip_config_takes_precedence(
    quick_gelu: bool | None, activation: str, openai: State, tmp_path: Path
) -> None:
    source = _open_clip_dir(tmp_path / "source", openai, quick_gelu)
    for given in (source, source / "open_clip_model.safetensors"):
        checkpoint = convert_checkpoint(given)
        config = checkpoint.model.config
        assert config.text_config.hidden_act == config.vision_config.hidden_act == activation
        assert config.vision_config.num_attention_heads == 4
        assert config.text_config.num_attention_heads == 2
        assert checkpoint.transform.mean == (0.5, 0.5, 0.5)
        assert same_weights(checkpoint, to_huggingface(openai))


def test_activation_option(openai: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(openai, tmp_path / "clip.safetensors")
    assert main([str(tmp_path / "clip.safetensors"), str(tmp_path / "a")]) == 0
    assert "quick_gelu (assumed" in capsys.readouterr().out
    assert main([str(tmp_path / "clip.safetensors"), str(tmp_path / "b"), "--activation", "gelu"]) == 0
    assert "assumed" not in capsys.readouterr().out
    assert CLIPConfig.from_pretrained(tmp_path / "b").vision_config.hidden_act == "gelu"
    with pytest.raises(ConfigError, match="relu"):
        convert_checkpoint(tmp_path / "clip.safetensors", activation="relu")
    with pytest.raises(ConfigError, match="contradicts"):
        convert_checkpoint(tmp_path / "b", activation="quick_gelu")


def test_open_clip_options_that_clip_lacks_are_refused(openai: State, tmp_path: Path) -> None:
    source = _open_clip_dir(tmp_path / "source", openai, pool_type="avg")
    with pytest.raises(CheckpointError, match=r"vision_cfg\.pool_type = 'avg'"):
        convert_checkpoint(source)


def test_hugging_face_directory_and_loose_files(openai: State, hugging_face_dir: Path, tmp_path: Path) -> None:
    expected = to_huggingface(openai)
    assert same_weights(convert_checkpoint(hugging_face_dir), expected)

    loose = {**expected, "text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(loose, tmp_path / "loose.safetensors")
    assert same_weights(convert_checkpoint(tmp_path / "loose.safetensors"), expected)

    old = tmp_path / "old"
    shutil.copytree(hugging_face_dir, old, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(loose, old / "pytorch_model.bin")
    processor = json.loads((old / "preprocessor_config.json").read_text())
    (old / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0.5, 0.5, 0.5]}))
    converted = convert_checkpoint(old)
    assert same_weights(converted, expected)
    assert converted.transform.mean == (0.5, 0.5, 0.5)


# --- stretching ---


def test_stretch_checkpoint(openai: State, tmp_path: Path) -> None:
    save_file(openai, tmp_path / "clip.safetensors")
    checkpoint = convert_checkpoint(tmp_path / "clip.safetensors")
    stretched = stretch_checkpoint(checkpoint, kept_positions=30, stretch_factor=2)
    assert stretched.model is checkpoint.model
    assert stretched.context_length == stretched.tokenizer.model_max_length == 30 + 47 * 2
    assert checkpoint.tokenizer.model_max_length == 77
    assert stretched.tokenizer.decode(stretched.tokenizer("a cat").input_ids, skip_special_tokens=True) == "a cat"
    table = stretched.model.text_model.embeddings.position_embedding.weight
    assert torch.equal(table, stretch_positions(openai["positional_embedding"], 30, 2))
    ids = torch.full((1, 124), 49407)
    assert stretched.model.get_text_features(input_ids=ids).pooler_output.shape == (1, DIM)


def test_stretched_models_are_not_stretched_again(
    tiny_checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = failure(capsys, tiny_checkpoint_dir, tmp_path / "out", "--stretch")
    assert status == CheckpointError.exit_code
    assert "248 text positions" in message
    assert not (tmp_path / "out").exists()
    assert main([str(tiny_checkpoint_dir), str(tmp_path / "out")]) == 0
    assert "248 -> 248 positions" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--kept-positions=78", "--kept-positions=-1", "--stretch-factor=0"])
def test_stretch_numbers_out_of_range(
    option: str, openai: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(openai, tmp_path / "clip.safetensors")
    status, message = failure(capsys, tmp_path / "clip.safetensors", tmp_path / "out", "--stretch", option)
    assert status == ConfigError.exit_code
    assert option[2:].split("=")[0].replace("-", "_") in message


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("OpenAI", "open_clip", "--stretch", "examples", "exit status"))


def test_names_without_a_wrapper_prefix_are_kept() -> None:
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert bare_names(state).keys() == state.keys()


def test_new_models_convert_to_themselves(tmp_path: Path) -> None:
    torch.manual_seed(1)
    checkpoint = new_model(tiny_config(77))
    save_checkpoint(checkpoint, tmp_path / "clip", {})
    assert same_weights(convert_checkpoint(tmp_path / "clip"), checkpoint.model.state_dict())
