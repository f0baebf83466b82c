"""Exported models, loaded by the software that they were exported for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection

from longclip.checkpoint import Checkpoint
from longclip.convert import convert_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.export import export_checkpoint
from longclip.formats.onnx import IMAGE_GRAPH, TEXT_GRAPH
from longclip.images import decode_image
from longclip.tokenizer import tokenize
from tests.conftest import picture
from tests.exported_models import TEXTS, random_clip, small_config
from tests.test_convert import same_weights

PICTURE = decode_image(picture(seed=3, size=(90, 70)))


def long_clip_embeddings(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Our own embeddings of `TEXTS` and of `PICTURE`, before normalisation."""
    pixels = checkpoint.transform.normalize(torch.from_numpy(checkpoint.transform.resize(PICTURE)[None]))
    with torch.no_grad():
        return {
            "text_embeds": encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, TEXTS)),
            "image_embeds": encode_image(checkpoint.model, pixels),
            "processed": pixels[0],
        }


def assert_same_embeddings(actual: dict[str, Tensor], checkpoint: Checkpoint, atol: float) -> None:
    expected = long_clip_embeddings(checkpoint)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol)
    # The late part of a text is read, or the comparison would not be worth much.
    assert not torch.allclose(expected["text_embeds"][1], expected["text_embeds"][2], atol=0.1)


def through_open_clip(source: str, checkpoint: Checkpoint, open_clip: Path, folder: Path) -> dict[str, Tensor]:
    """What open_clip makes of the weights at `source`, in a process of its own."""
    transform = checkpoint.transform
    pixels = torch.from_numpy(transform.resize(PICTURE))
    pixel_values = transform.normalize(pixels[None])
    save_file({"pixel_values": pixel_values, "picture": pixels}, folder / "inputs.safetensors")
    script = Path(__file__).with_name("through_open_clip.py")
    command = [sys.executable, str(script), source, str(folder / "inputs.safetensors"), str(folder / "out.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(open_clip)}  # behind the script's own folder
    done = subprocess.run(
        command, input=json.dumps(TEXTS), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_loads_model_tokenizer_and_transform(activation: str, open_clip: Path, tmp_path: Path) -> None:
    checkpoint = random_clip(small_config(context_length=248, activation=activation))
    export_checkpoint(checkpoint, "open_clip", tmp_path / "exported")
    results = through_open_clip(f"local-dir:{tmp_path / 'exported'}", checkpoint, open_clip, tmp_path)
    assert_same_embeddings(results, checkpoint, atol=1e-5)
    ours = tokenize(checkpoint.tokenizer, TEXTS).input_ids
    assert results["input_ids"].shape == (len(TEXTS), 248)
    assert torch.equal(results["input_ids"][:, : ours.shape[1]], ours)
    torch.testing.assert_close(results["processed"], long_clip_embeddings(checkpoint)["processed"], rtol=0, atol=1e-5)


def rounded_to_half(config: CLIPConfig) -> Checkpoint:
    """A CLIP whose weights survive the float16 that OpenAI's loaders put them through."""
    checkpoint = random_clip(config)
    checkpoint.model.half().float()
    return checkpoint


def test_openai_layout_is_loaded(open_clip: Path, tmp_path: Path) -> None:
    checkpoint = rounded_to_half(small_config())
    export_checkpoint(checkpoint, "openai", tmp_path / "clip.pt")
    assert_same_embeddings(
        through_open_clip(str(tmp_path / "clip.pt"), checkpoint, open_clip, tmp_path), checkpoint, atol=1e-5
    )


def test_official_long_clip_is_openai_layout_with_two_tables(open_clip: Path, tmp_path: Path) -> None:
    checkpoint = rounded_to_half(small_config(context_length=248))
    export_checkpoint(checkpoint, "long-clip", tmp_path / "exported.pt")
    state = torch.load(tmp_path / "exported.pt", weights_only=True)
    # `encode_text` of the official code (model/model_longclip.py): each table through its mask, then as in OpenAI's.
    frozen = (torch.arange(248) < 20).float()[:, None]
    trained = state.pop("positional_embedding_res")
    state["positional_embedding"] = state["positional_embedding"] * frozen + trained * (1 - frozen)
    torch.save(state, tmp_path / "merged.pt")
    results = through_open_clip(str(tmp_path / "merged.pt"), checkpoint, open_clip, tmp_path)
    assert_same_embeddings(results, checkpoint, atol=1e-5)
    assert results["input_ids"].shape == (len(TEXTS), 248)


def test_sentence_transformers_loads_texts_and_images(small_long_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(small_long_clip, "sentence-transformers", tmp_path / "exported")
    model = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    assert model.max_seq_length == 248
    results = {
        "text_embeds": model.encode(TEXTS, convert_to_tensor=True),
        "image_embeds": model.encode([PICTURE], convert_to_tensor=True),
    }
    assert_same_embeddings(results, small_long_clip, atol=1e-5)


def test_text_encoder_file_is_all_that_a_text_encoder_needs(small_long_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(small_long_clip, "text-encoder", tmp_path / "clip_l.safetensors")
    state = load_file(tmp_path / "clip_l.safetensors")
    # What comfy/text_encoders/long_clipl.py of ComfyUI looks at to tell a Long-CLIP.
    assert state["text_model.embeddings.position_embedding.weight"].shape[0] == 248
    assert "text_model.encoder.layers.1.mlp.fc1.weight" in state  # and its comfy/sd.py, to tell CLIP-L from others
    config = small_long_clip.model.config
    text_config = CLIPTextConfig(**{**config.text_config.to_dict(), "projection_dim": config.projection_dim})
    model = CLIPTextModelWithProjection(text_config)
    model.load_state_dict(state)
    tokens = small_long_clip.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**tokens).text_embeds
    torch.testing.assert_close(found, long_clip_embeddings(small_long_clip)["text_embeds"], rtol=0, atol=1e-5)


def test_onnxruntime_computes_both_towers_of_any_length(small_long_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(small_long_clip, "onnx", tmp_path / "exported")
    expected = long_clip_embeddings(small_long_clip)
    text = InferenceSession(str(tmp_path / "exported" / TEXT_GRAPH))
    tokens = tokenize(small_long_clip.tokenizer, TEXTS)
    assert tokens.input_ids.shape[1] == 248
    (together,) = text.run(["text_embeds"], {"input_ids": tokens.input_ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(together), unit(expected["text_embeds"]), rtol=0, atol=1e-4)
    for row, length in enumerate(tokens.lengths.tolist()):
        (alone,) = text.run(None, {"input_ids": tokens.input_ids[row : row + 1, :length].numpy()})
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    image = InferenceSession(str(tmp_path / "exported" / IMAGE_GRAPH))
    for rows in (1, 5):
        (actual,) = image.run(["image_embeds"], {"pixel_values": expected["processed"].repeat(rows, 1, 1, 1).numpy()})
        torch.testing.assert_close(
            torch.from_numpy(actual), unit(expected["image_embeds"]).repeat(rows, 1), rtol=0, atol=1e-4
        )


def test_onnx_directory_is_a_small_valid_checkpoint(small_long_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(small_long_clip, "onnx", tmp_path / "exported")
    for name in (TEXT_GRAPH, IMAGE_GRAPH):
        onnx.checker.check_model(str(tmp_path / "exported" / name), full_check=True)
        assert (tmp_path / "exported" / name).stat().st_size < 100_000
        assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "exported" / name).read_bytes()
    assert same_weights(convert_checkpoint(tmp_path / "exported"), small_long_clip.model.state_dict())
