"""Diffusers pipelines of random weights and the real vocabulary, of some thousand weights each."""

from typing import Any

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

from longclip.checkpoint import Checkpoint
from longclip.stretch import stretch_checkpoint
from longclip.tokenizer import build_tokenizer
from tests.support.exported_models import random_clip, small_config

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
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, shift_factor=0.0).eval(),
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
