"""Every consumer once more with a stretched model of the size of ViT-B/16, whose weights are random."""

from pathlib import Path

import pytest
from transformers import CLIPConfig

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.export import export_checkpoint
from longclip.stretch import stretch_checkpoint
from longclip.weights.reading import convert_checkpoint
from tests.support.consumers import CONSUMERS, assert_same_embeddings
from tests.support.exported_models import random_clip
from tests.support.weights import same_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_clip() -> Checkpoint:
    """B/16, 224 pixels, 248 positions: 150 million weights."""
    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 49407})
    return stretch_checkpoint(random_clip(config, noise=0.02))  # more would saturate attention of this width


@pytest.mark.parametrize("name", CONSUMERS)
def test_embeddings_are_the_same(name: str, large_clip: Checkpoint, tmp_path: Path) -> None:
    embeddings, tolerance = CONSUMERS[name]
    assert_same_embeddings(embeddings(large_clip, tmp_path), large_clip, tolerance)


@pytest.mark.parametrize("name", ["long-clip", "text-encoder"])
def test_round_trip_of_files_is_bit_equal(name: str, large_clip: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(large_clip, name, tmp_path / "file")
    image_tower = None
    if name == "text-encoder":
        image_tower = tmp_path / "clip"
        save_checkpoint(large_clip, image_tower, {})
    again = convert_checkpoint(tmp_path / "file", image_tower=image_tower)
    assert same_weights(again, large_clip.model.state_dict())
