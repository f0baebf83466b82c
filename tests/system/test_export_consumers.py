"""Exported models, loaded by the software that they were exported for."""

from pathlib import Path

import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection

from longclip.checkpoint import Checkpoint
from longclip.encode import encode_text, unit
from longclip.export import export_checkpoint
from longclip.tokenizer import tokenize
from longclip.weights.onnx import IMAGE_GRAPH, TEXT_GRAPH
from longclip.weights.reading import convert_checkpoint
from tests.support.consumers import CONSUMERS, assert_same_embeddings, from_open_clip, our_embeddings, through_open_clip
from tests.support.exported_models import TEXTS, random_clip, small_config
from tests.support.weights import same_weights


@pytest.mark.parametrize("name", CONSUMERS)
def test_embeddings_are_the_same(name: str, small_long_clip: Checkpoint, tmp_path: Path) -> None:
    embeddings, tolerance = CONSUMERS[name]
    assert_same_embeddings(embeddings(small_long_clip, tmp_path), small_long_clip, tolerance)


def test_texts_that_differ_late_have_different_embeddings(small_long_clip: Checkpoint) -> None:
    """Or their comparison would not be worth much."""
    late = [TEXTS[2][:400] + ending for ending in (" and a red bus", " and a green boat")]
    tokens = tokenize(small_long_clip.tokenizer, late)
    assert tokens.lengths.min() > 77
    first, second = unit(encode_text(small_long_clip.model, tokens))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_loads_model_tokenizer_and_transform(activation: str, tmp_path: Path) -> None:
    checkpoint = random_clip(small_config(context_length=248, activation=activation))
    results = through_open_clip(checkpoint, tmp_path)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(results[name], our_embeddings(checkpoint)[name], rtol=0, atol=1e-5)
    ours = tokenize(checkpoint.tokenizer, TEXTS).input_ids
    assert results["input_ids"].shape == (len(TEXTS), 248)
    assert torch.equal(results["input_ids"][:, : ours.shape[1]], ours)
    torch.testing.assert_close(results["processed"], our_embeddings(checkpoint)["processed"], rtol=0, atol=1e-5)


def rounded_to_half(config: CLIPConfig) -> Checkpoint:
    """A CLIP whose weights survive the float16 that OpenAI's loaders put them through."""
    checkpoint = random_clip(config)
    checkpoint.model.half().float()
    return checkpoint


def test_openai_layout_is_loaded(tmp_path: Path) -> None:
    checkpoint = rounded_to_half(small_config())
    export_checkpoint(checkpoint, "openai", tmp_path / "clip.pt")
    assert_same_embeddings(from_open_clip(str(tmp_path / "clip.pt"), checkpoint, tmp_path), checkpoint)


def test_official_long_clip_is_openai_layout_with_two_position_tables(tmp_path: Path) -> None:
    checkpoint = rounded_to_half(small_config(context_length=248))
    export_checkpoint(checkpoint, "long-clip", tmp_path / "exported.pt")
    state = torch.load(tmp_path / "exported.pt", weights_only=True)
    # `encode_text` of the official code (model/model_longclip.py): each table through its mask, then as in OpenAI's.
    frozen = (torch.arange(248) < 20).float()[:, None]
    trained = state.pop("positional_embedding_res")
    state["positional_embedding"] = state["positional_embedding"] * frozen + trained * (1 - frozen)
    torch.save(state, tmp_path / "merged.pt")
    results = from_open_clip(str(tmp_path / "merged.pt"), checkpoint, tmp_path)
    assert_same_embeddings(results, checkpoint)
    assert results["input_ids"].shape == (len(TEXTS), 248)


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
    torch.testing.assert_close(found, our_embeddings(small_long_clip)["text_embeds"], rtol=0, atol=1e-5)


def test_onnxruntime_computes_both_towers_of_any_length(small_long_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(small_long_clip, "onnx", tmp_path / "exported")
    expected = our_embeddings(small_long_clip)
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
