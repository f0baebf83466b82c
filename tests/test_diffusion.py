"""Long prompts in diffusers pipelines: tiny ones of random weights, with the real vocabulary."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.convert import stretch_checkpoint
from longclip.diffusion import use_long_clip
from longclip.errors import CheckpointError, ConfigError
from longclip.tokenizer import build_tokenizer, count_tokens
from tests.exported_models import random_clip, small_config

EARLY = "a wide street in the rain with many people under umbrellas " * 8
PROMPT, OTHER_LATE = EARLY + "and a red bus", EARLY + "and a green boat"
"""They differ behind token 77 only."""

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 48,
    "use_linear_projection": True,
}


def text_config(activation: str = "quick_gelu", layers: int = 2, width: int = 64, dim: int = 32) -> CLIPTextConfig:
    """The text tower of `small_config`; the end token as in OpenAI's conversions, which the old pipelines have."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=1,
        num_hidden_layers=layers,
        hidden_act=activation,
        projection_dim=dim,
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )


def tokenizer_with_padding(token: str) -> Any:
    """SD 1.x pads with the end token, SD 2.x and the second encoder of SDXL with an exclamation mark, token 0."""
    tokenizer = build_tokenizer(77)
    tokenizer.pad_token = token
    return tokenizer


def image_parts() -> dict[str, Any]:
    return {
        "vae": AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }


def stable_diffusion(activation: str = "quick_gelu", padding: str = "<|endoftext|>") -> Any:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        **image_parts(),
        unet=UNet2DConditionModel(**UNET, cross_attention_dim=64).eval(),
        text_encoder=CLIPTextModel(text_config(activation)).eval(),
        tokenizer=tokenizer_with_padding(padding),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    torch.manual_seed(0)
    second = text_config("gelu", width=128, dim=48)
    return StableDiffusionXLPipeline(
        **image_parts(),
        unet=UNet2DConditionModel(**UNET, **SDXL_UNET, cross_attention_dim=64 + 128).eval(),
        text_encoder=CLIPTextModel(text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer_with_padding("<|endoftext|>"),
        tokenizer_2=tokenizer_with_padding("!"),
    )


def flux() -> Any:
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=49408, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1).eval(),
        text_encoder=CLIPTextModel(text_config()).eval(),
        tokenizer=tokenizer_with_padding("<|endoftext|>"),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=build_tokenizer(512),  # stands for T5's, whose vocabulary is a download
        transformer=transformer.eval(),
    )


PIPELINES = {
    "SD 1.x": stable_diffusion,
    "SD 2.x": lambda: stable_diffusion("gelu", "!"),
    "SDXL": stable_diffusion_xl,
    "Flux": flux,
}


def long_clip_for(name: str) -> Checkpoint:
    """Of SD 2.x the checkpoint has a layer more than the pipeline, as OpenCLIP-H has."""
    config = small_config(activation="gelu", layers=3) if name == "SD 2.x" else small_config()
    return stretch_checkpoint(random_clip(config, seed=5))


def latents(pipeline: Any, prompt: str, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    if isinstance(pipeline, FluxPipeline):
        # T5 gets a prompt of its own: what is seen is CLIP's part.
        options["prompt_2"] = "the same"
    return pipeline(prompt, generator=generator, **size, **options).images


@pytest.mark.parametrize("name", PIPELINES)
def test_late_part_of_a_prompt_is_seen_with_long_clip_only(name: str) -> None:
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
def test_saved_pipeline_needs_nothing_of_ours(name: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[name]()
    use_long_clip(pipeline, long_clip_for(name))
    pipeline.save_pretrained(tmp_path / "saved")
    assert "longclip" not in (tmp_path / "saved" / "model_index.json").read_text()
    loaded = type(pipeline).from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer.model_max_length == 248
    torch.testing.assert_close(latents(loaded, PROMPT), latents(pipeline, PROMPT), rtol=0, atol=1e-6)


def test_first_prompt_embeddings_are_those_of_the_text_tower() -> None:
    pipeline, checkpoint = stable_diffusion(), long_clip_for("SD 1.x")
    with use_long_clip(pipeline, checkpoint):
        embeddings, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt="blurred")
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
    pipeline.text_encoder._hf_hook = object()
    with pytest.raises(ConfigError, match="offloaded; call use_long_clip before"):
        use_long_clip(pipeline, checkpoint)
    pipeline.text_encoder = None
    with pytest.raises(ConfigError, match="StableDiffusionPipeline has no CLIP text encoder"):
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
