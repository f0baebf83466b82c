"""Every consumer once more with a stretched model of the size of ViT-B/16, whose weights are random."""

from pathlib import Path

import pytest
import torch
from onnxruntime import InferenceSession
from sentence_transformers import SentenceTransformer
from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.convert import convert_checkpoint, stretch_checkpoint
from longclip.encode import unit
from longclip.export import export_checkpoint
from longclip.formats.onnx import IMAGE_GRAPH, TEXT_GRAPH
from longclip.tokenizer import tokenize
from tests.exported_models import TEXTS, random_clip
from tests.test_convert import same_weights
from tests.test_export_consumers import PICTURE, assert_same_embeddings, long_clip_embeddings, through_open_clip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_clip() -> Checkpoint:
    """B/16, 224 pixels, 248 positions: 150 million weights."""
    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 49407})
    return stretch_checkpoint(random_clip(config, noise=0.02))  # more would saturate attention of this width


def test_transformers(large_clip: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(large_clip, tmp_path / "clip", {})
    text, image = (
        kind.from_pretrained(tmp_path / "clip") for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection)
    )
    tokens = large_clip.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixel_values = long_clip_embeddings(large_clip)["processed"][None]
    with torch.no_grad():
        results = {"text_embeds": text(**tokens).text_embeds, "image_embeds": image(pixel_values).image_embeds}
    assert_same_embeddings(results, large_clip, atol=1e-5)


def test_open_clip(large_clip: Checkpoint, open_clip: Path, tmp_path: Path) -> None:
    export_checkpoint(large_clip, "open_clip", tmp_path / "exported")
    results = through_open_clip(f"local-dir:{tmp_path / 'exported'}", large_clip, open_clip, tmp_path)
    assert_same_embeddings(results, large_clip, atol=1e-5)


def test_sentence_transformers(large_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(large_clip, "sentence-transformers", tmp_path / "exported")
    model = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    results = {
        "text_embeds": model.encode(TEXTS, convert_to_tensor=True),
        "image_embeds": model.encode([PICTURE], convert_to_tensor=True),
    }
    assert_same_embeddings(results, large_clip, atol=1e-5)


def test_onnxruntime(large_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(large_clip, "onnx", tmp_path / "exported")
    expected = long_clip_embeddings(large_clip)
    given = {
        TEXT_GRAPH: ({"input_ids": tokenize(large_clip.tokenizer, TEXTS).input_ids.numpy()}, "text_embeds"),
        IMAGE_GRAPH: ({"pixel_values": expected["processed"][None].numpy()}, "image_embeds"),
    }
    for graph, (inputs, name) in given.items():
        (actual,) = InferenceSession(str(tmp_path / "exported" / graph)).run([name], inputs)
        torch.testing.assert_close(torch.from_numpy(actual), unit(expected[name]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["long-clip", "text-encoder"])
def test_files_come_back_bit_for_bit(name: str, large_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(large_clip, name, tmp_path / "file")
    image_tower = None
    if name == "text-encoder":
        image_tower = tmp_path / "clip"
        save_checkpoint(large_clip, image_tower, {})
    again = convert_checkpoint(tmp_path / "file", image_tower=image_tower)
    assert same_weights(again, large_clip.model.state_dict())
