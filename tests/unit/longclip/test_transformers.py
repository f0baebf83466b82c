"""A checkpoint directory, loaded by the classes of transformers with nothing of ours."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    pipeline,
)

from longclip.checkpoint import Checkpoint, load_checkpoint, new_model, save_checkpoint
from tests.support.consumers import PICTURE, our_embeddings
from tests.support.exported_models import TEXTS
from tests.support.tiny_clip import tiny_config


def token_ids(directory: Path, padding: str) -> Tensor:
    """`TEXTS` by the tokenizer that AutoTokenizer finds; padded with the end token, to the longest or to 248."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.model_max_length == 248
    return tokenizer(TEXTS, padding=padding, truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_classes_with_projections(padding: str, small_long_clip: Checkpoint, small_long_clip_dir: Path) -> None:
    expected = our_embeddings(small_long_clip)
    input_ids = token_ids(small_long_clip_dir, padding)
    assert input_ids.shape == (len(TEXTS), 248)
    processor = AutoImageProcessor.from_pretrained(small_long_clip_dir)
    pixel_values = processor(PICTURE, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values[0], expected["processed"], rtol=0, atol=1e-5)
    both, text, image = (
        kind.from_pretrained(small_long_clip_dir)
        for kind in (CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection)
    )
    with torch.no_grad():
        text_embeds = [text(input_ids).text_embeds, both.get_text_features(input_ids=input_ids).pooler_output]
        image_embeds = [image(pixel_values).image_embeds, both.get_image_features(pixel_values).pooler_output]
    for found in text_embeds:
        torch.testing.assert_close(found, expected["text_embeds"], rtol=0, atol=1e-5)
    for found in image_embeds:
        torch.testing.assert_close(found, expected["image_embeds"], rtol=0, atol=1e-5)


def test_single_towers(small_long_clip: Checkpoint, small_long_clip_dir: Path) -> None:
    input_ids = token_ids(small_long_clip_dir, "longest")
    text, image = (kind.from_pretrained(small_long_clip_dir) for kind in (CLIPTextModel, CLIPVisionModel))
    expected, model = our_embeddings(small_long_clip), small_long_clip.model
    with torch.no_grad():
        pooled = text(input_ids)
        torch.testing.assert_close(
            model.text_projection(pooled.pooler_output), expected["text_embeds"], rtol=0, atol=1e-5
        )
        seen = model.visual_projection(image(expected["processed"][None]).pooler_output)
    assert pooled.last_hidden_state.shape == (len(TEXTS), 248, 64)
    torch.testing.assert_close(seen, expected["image_embeds"], rtol=0, atol=1e-5)


def test_no_weight_is_missing_or_left_over(small_long_clip_dir: Path) -> None:
    _, report = CLIPModel.from_pretrained(small_long_clip_dir, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoModel.from_pretrained(small_long_clip_dir)) is CLIPModel


def test_zero_shot_classification_reads_long_labels(small_long_clip: Checkpoint, small_long_clip_dir: Path) -> None:
    classify = pipeline("zero-shot-image-classification", model=str(small_long_clip_dir))
    early = "a wide street in the rain with many people under umbrellas " * 8
    labels = ["a cat", early + "and a red bus", early + "and a green boat"]
    scores = {found["label"]: found["score"] for found in classify(PICTURE, labels, hypothesis_template="{}")}

    processor = CLIPProcessor.from_pretrained(small_long_clip_dir)
    inputs = processor(text=labels, images=PICTURE, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = small_long_clip.model(**inputs).logits_per_image[0].softmax(0)
    assert inputs.input_ids.shape[1] > 77
    torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected, rtol=0, atol=1e-5)
    assert abs(scores[labels[1]] - scores[labels[2]]) > 1e-4


def test_projections_of_models_made_from_scratch(tmp_path: Path) -> None:
    """Their configs name the width of the embedding once; the classes of one tower look for it in the tower."""
    config = tiny_config()
    assert config.text_config.projection_dim != config.projection_dim
    save_checkpoint(new_model(config), tmp_path / "clip", {})
    for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
        assert kind.from_pretrained(tmp_path / "clip").config.projection_dim == config.projection_dim
    assert load_checkpoint(tmp_path / "clip").model.config.projection_dim == config.projection_dim
