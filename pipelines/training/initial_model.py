"""The model that a run starts from."""

import torch
from transformers import CLIPConfig, CLIPModel

from longclip.checkpoint import Checkpoint, load_checkpoint, new_model
from longclip.constants import CLIP_CONTEXT_LENGTH
from longclip.errors import CheckpointError, ConfigError
from longclip.stretch import (
    freeze_kept_positions,
    interpolate_positions,
    replace_positions,
    stretch_checkpoint,
    text_positions,
)
from longclip.tokenizer import build_tokenizer
from longclip.training.freeze import lock_tower
from pipelines.training.settings import Architecture, FinetuneSettings, Model, Tower


def initial_checkpoint(settings: FinetuneSettings) -> Checkpoint:
    """The model before the first step; the same in every process.

    Raises:
        CheckpointError: `model.base` cannot be read, is not a CLIP model, or is stretched already.
        ConfigError: its positions cannot be stretched, or its towers cannot be locked, as the settings ask.
    """
    torch.manual_seed(settings.seed)
    architecture = settings.model.architecture
    if architecture is not None:
        checkpoint = new_model(_clip_config(architecture))
    else:
        checkpoint = load_checkpoint(str(settings.model.base))
    model, kept, factor = checkpoint.model, settings.model.kept_positions, settings.model.stretch_factor
    if settings.model.positions == "stretch":
        if checkpoint.context_length > CLIP_CONTEXT_LENGTH:
            raise CheckpointError(
                f"model.base='{settings.model.base}' has {checkpoint.context_length} text positions, so it is stretched"
                " already; set model.positions=keep to train it as it is"
            )
        checkpoint = stretch_checkpoint(checkpoint, kept, factor)
        freeze_kept_positions(model, kept)
    elif settings.model.positions == "interpolate":
        table = text_positions(model)
        replace_positions(model, interpolate_positions(table, kept + (len(table) - kept) * factor))
        checkpoint.tokenizer.model_max_length = checkpoint.context_length
    elif architecture is None and checkpoint.context_length > CLIP_CONTEXT_LENGTH:  # as after its stretch
        freeze_kept_positions(model, kept)
    if settings.optim.logit_scale is not None:
        model.logit_scale.data.fill_(settings.optim.logit_scale).log_()
    _lock(model, settings.model)
    return checkpoint


def _lock(model: CLIPModel, settings: Model) -> None:
    for tower, locked, unlocked in settings.locks:
        try:
            if locked:
                lock_tower(model, tower, unlocked)
        except ValueError as error:
            raise ConfigError(f"model.lock_{tower}_unlocked_groups={unlocked}: {error}") from error


def _clip_config(architecture: Architecture) -> CLIPConfig:
    def tower(size: Tower) -> dict[str, int]:
        return {
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
        }

    tokenizer = build_tokenizer(architecture.context_length)
    return CLIPConfig(
        text_config={
            **tower(architecture.text),
            "max_position_embeddings": architecture.context_length,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 0,
        },
        vision_config={
            **tower(architecture.vision),
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
        },
        projection_dim=architecture.embedding_dim,
    )
