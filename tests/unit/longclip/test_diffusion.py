"""Long prompts in diffusers pipelines."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from longclip.checkpoint import save_checkpoint
from longclip.diffusion import use_long_clip
from longclip.errors import CheckpointError, ConfigError
from longclip.stretch import stretch_checkpoint
from longclip.tokenizer import count_tokens
from tests.support.exported_models import random_clip, small_config
from tests.support.tiny_pipelines import (
    EARLY,
    OTHER_LATE,
    PIPELINES,
    PROMPT,
    latents,
    long_clip_for,
    stable_diffusion,
    stable_diffusion_xl,
)


@pytest.mark.parametrize("name", PIPELINES)
def test_only_long_clip_reads_the_late_part_of_a_prompt(name: str) -> None:
    pipeline = PIPELINES[name]()
    early, *whole = count_tokens(pipeline.tokenizer, [EARLY, PROMPT, OTHER_LATE])
    assert 77 < early < min(whole) <= max(whole) < 248
    plain = latents(pipeline, PROMPT)
    assert torch.equal(plain, latents(pipeline, OTHER_LATE))

    use = use_long_clip(pipeline, long_clip_for(name))
    long = latents(pipeline, PROMPT)
    assert torch.isfinite(long).all()
    assert (long - latents(pipeline, OTHER_LATE)).abs().max() > 1e-3
    assert torch.equal(long, latents(pipeline, PROMPT))

    use.undo()
    assert torch.equal(plain, latents(pipeline, PROMPT))
    use.undo()


@pytest.mark.parametrize("name", PIPELINES)
def test_saved_pipeline_loads_without_longclip(name: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[name]()
    use_long_clip(pipeline, long_clip_for(name))
    pipeline.save_pretrained(tmp_path / "saved")
    assert "longclip" not in (tmp_path / "saved" / "model_index.json").read_text()
    loaded = type(pipeline).from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer.model_max_length == 248
    torch.testing.assert_close(latents(loaded, PROMPT), latents(pipeline, PROMPT), rtol=0, atol=1e-6)


def test_prompt_embeddings_equal_the_text_tower() -> None:
    pipeline, checkpoint = stable_diffusion(), long_clip_for("SD 1.x")
    with use_long_clip(pipeline, checkpoint):
        embeddings, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt="blurred")
        assert pipeline.tokenizer.decode(pipeline.tokenizer("a cat").input_ids, skip_special_tokens=True) == "a cat"
    assert embeddings.shape == negative.shape == (1, 248, 64)
    padded = checkpoint.tokenizer([PROMPT, "blurred"], padding="max_length", return_tensors="pt").input_ids
    assert padded[0, -1] == padded[1, 3] == 49407  # padded with the end token, as SD 1.x is
    with torch.no_grad():
        expected = checkpoint.model.text_model(input_ids=padded).last_hidden_state
    torch.testing.assert_close(torch.cat([embeddings, negative]), expected, rtol=0, atol=1e-5)


def test_sd2_drops_the_last_layer_and_keeps_its_padding() -> None:
    pipeline, checkpoint = PIPELINES["SD 2.x"](), long_clip_for("SD 2.x")
    use_long_clip(pipeline, checkpoint)
    embeddings, _ = pipeline.encode_prompt("a cat", "cpu", 1, False)
    input_ids = torch.zeros(1, 248, dtype=torch.int64)
    input_ids[0, :4] = torch.tensor(checkpoint.tokenizer("a cat").input_ids)
    with torch.no_grad():
        hidden = checkpoint.model.text_model(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]
        expected = checkpoint.model.text_model.final_layer_norm(hidden)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


def test_sdxl_with_a_checkpoint_for_each_encoder() -> None:
    second_config = small_config(activation="gelu")
    second_config.text_config.hidden_size, second_config.text_config.intermediate_size = 128, 512
    second_config.projection_dim = 48
    first, second = long_clip_for("SDXL"), stretch_checkpoint(random_clip(second_config, seed=6))
    pipeline = stable_diffusion_xl()
    use_long_clip(pipeline, first, second)
    embeddings, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPT, negative_prompt="blurred")
    assert embeddings.shape == negative.shape == (1, 248, 64 + 128)
    with torch.no_grad():
        texts = second.tokenizer([PROMPT, "blurred"], padding=True, return_tensors="pt")
        expected = second.model.get_text_features(input_ids=texts.input_ids).pooler_output
    torch.testing.assert_close(torch.cat([pooled, negative_pooled]), expected, rtol=0, atol=1e-5)
    for checkpoint, part in ((first, embeddings[..., :64]), (second, embeddings[..., 64:])):
        input_ids = checkpoint.tokenizer([PROMPT], return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = checkpoint.model.text_model(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(part[:, : input_ids.shape[1]], hidden, rtol=0, atol=1e-5)


def test_dtype_stays_and_the_checkpoint_is_not_shared() -> None:
    pipeline, checkpoint = stable_diffusion().to(torch.bfloat16), long_clip_for("SD 1.x")
    before = checkpoint.model.text_model.final_layer_norm.weight.clone()
    use_long_clip(pipeline, checkpoint)
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert checkpoint.model.dtype == torch.float32
    with torch.no_grad():
        for weight in pipeline.text_encoder.parameters():
            weight.zero_()
    assert torch.equal(checkpoint.model.text_model.final_layer_norm.weight, before)


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_beyond_the_limit_are_reported(name: str) -> None:
    pipeline = PIPELINES[name]()
    use_long_clip(pipeline, long_clip_for(name))
    too_long = "a red bus and " * 80
    (count,) = count_tokens(pipeline.tokenizer, [too_long])
    with pytest.warns(UserWarning, match=rf"^prompt: {count} tokens, of which only the first 247 and the end are read"):
        latents(pipeline, too_long)
    if name == "Flux":  # guidance is distilled into it; T5 reads the second prompt, up to 512 tokens
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipeline.encode_prompt(PROMPT, prompt_2=too_long)
    else:
        with pytest.warns(UserWarning, match=rf"^negative_prompt: {count} tokens"):
            latents(pipeline, PROMPT, negative_prompt=too_long)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        latents(pipeline, PROMPT)


def test_pipelines_that_cannot_be_changed(tmp_path: Path) -> None:
    checkpoint = long_clip_for("SD 1.x")
    pipeline = stable_diffusion()
    with pytest.raises(ConfigError, match="one CLIP text encoder, text_encoder; leave checkpoint_2 out"):
        use_long_clip(pipeline, checkpoint, checkpoint)
    use_long_clip(pipeline, checkpoint)
    with pytest.raises(ConfigError, match="uses Long-CLIP already"):
        use_long_clip(pipeline, checkpoint)

    pipeline = stable_diffusion()
    pipeline.tokenizer.add_tokens(["<my-cat>"])
    with pytest.raises(ConfigError, match="49408 tokens, its tokenizer has 49409; load textual inversions after"):
        use_long_clip(pipeline, checkpoint)
    pipeline = stable_diffusion()
    pipeline.text_encoder.lora_A = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"text_encoder of .* has a LoRA, which would be lost; load it after"):
        use_long_clip(pipeline, checkpoint)
    pipeline = stable_diffusion()
    pipeline.text_encoder._hf_hook = object()
    with pytest.raises(ConfigError, match="offloaded; call use_long_clip before"):
        use_long_clip(pipeline, checkpoint)
    pipeline.text_encoder = None
    with pytest.raises(ConfigError, match="StableDiffusionPipeline does not encode prompts with a CLIP"):
        use_long_clip(pipeline, checkpoint)


def test_checkpoints_of_another_clip_are_refused(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    for config, message in (
        (small_config(activation="gelu"), "hidden_act gelu, the pipeline's text_encoder quick_gelu; take a Long-CLIP"),
        (small_config(layers=1), "num_hidden_layers 1, the pipeline's text_encoder 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            use_long_clip(pipeline, random_clip(config))
    with pytest.raises(CheckpointError, match="does not exist"):
        use_long_clip(pipeline, tmp_path / "no" / "where")
    with pytest.raises(CheckpointError, match=r"124 in text_encoder and 248 in text_encoder_2; give checkpoint_2"):
        use_long_clip(stable_diffusion_xl(), stretch_checkpoint(random_clip(small_config()), 30, 2))


def test_checkpoints_may_be_any_source_and_any_length(tmp_path: Path) -> None:
    save_checkpoint(stretch_checkpoint(random_clip(small_config()), 10, 3), tmp_path / "clip", {})
    pipeline = stable_diffusion()
    with use_long_clip(pipeline, tmp_path / "clip"):
        assert pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0].shape == (1, 10 + 67 * 3, 64)
    assert pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0].shape == (1, 77, 64)
