"""Long-CLIP as the text encoder of a diffusers pipeline: prompts of 248 tokens instead of 77.

    from longclip.diffusion import use_long_clip

    use_long_clip(pipeline, "checkpoints/longclip-l")
    pipeline("a prompt of up to 248 tokens", negative_prompt="...")

The pipeline's own code does the rest: it pads every prompt to the length of its tokenizer. What
`pipeline.save_pretrained` writes does not depend on this library.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from longclip.checkpoint import Checkpoint
from longclip.errors import CheckpointError, ConfigError
from longclip.stretch import stretch_positions
from longclip.tokenizer import count_tokens
from longclip.weights.reading import convert_checkpoint

TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

# Text encoders of a pipeline with their tokenizers, and the arguments of `encode_prompt` that they read.
_PLACES = {
    "text_encoder": ("tokenizer", ("prompt", "negative_prompt")),
    "text_encoder_2": ("tokenizer_2", ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")),
}
# What must be equal for the image model to understand the text tower.
_SAME = ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "vocab_size")


class LongClipUse:
    """A pipeline that reads long prompts until `undo`, or until the end of a `with` block."""

    def __init__(self, pipeline: Any, changes: Mapping[str, Any], encode_prompt: Callable[..., Any]) -> None:
        self._pipeline = pipeline
        self._before = {name: getattr(pipeline, name) for name in changes}
        for name, value in changes.items():
            setattr(pipeline, name, value)
        pipeline.encode_prompt = encode_prompt

    def undo(self) -> None:
        """Restore the pipeline; a second call does nothing."""
        if self._before:
            del self._pipeline.encode_prompt  # so that the method of its class is used
        for name, value in self._before.items():
            setattr(self._pipeline, name, value)
        self._before = {}

    def __enter__(self) -> "LongClipUse":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_long_clip(
    pipeline: Any, checkpoint: str | Path | Checkpoint, checkpoint_2: str | Path | Checkpoint | None = None
) -> LongClipUse:
    """Make a diffusers pipeline read prompts as long as a checkpoint's context.

    For pipelines with CLIP text encoders: Stable Diffusion 1.x (CLIP-L) and 2.x (OpenCLIP-H without its last layer),
    SDXL and SD3 (CLIP-L and bigG, pooled output included), Flux (CLIP-L, pooled output). Negative prompts and the empty
    prompt of classifier-free guidance get the same length. Longer prompts cause a warning with their token count. Call
    this before offloading and before loading LoRAs and textual inversions. Weights get the dtype and device of those
    that they replace.

    Args:
        pipeline: the pipeline, changed in place.
        checkpoint: for the first CLIP text encoder: a checkpoint, or any source that `convert_checkpoint` reads.
        checkpoint_2: for the second one, if there are two. If None, the pipeline's second one is stretched, untrained.

    Returns:
        A handle that undoes the change.

    Raises:
        ConfigError: the pipeline has no CLIP text encoder, uses Long-CLIP already, or cannot be changed now.
        CheckpointError: a checkpoint is of a different CLIP than the pipeline's, or the two differ in length.
    """
    places = [place for place in _PLACES if isinstance(getattr(pipeline, place, None), TextEncoder)]
    _require_usable(pipeline, places, checkpoint_2)
    changes: dict[str, Any] = {}
    for place, given in zip(places, (checkpoint, checkpoint_2), strict=False):
        encoder = getattr(pipeline, place)
        if given is None:
            changes[place] = _stretched(encoder)
        else:
            loaded = given if isinstance(given, Checkpoint) else convert_checkpoint(given)
            changes[place] = _replaced(encoder, loaded, place)
    context_length = _common_length(changes)
    for place in places:
        name, _ = _PLACES[place]
        # It keeps the padding token that the image model was trained with. A deep copy would lose its decoder.
        tokenizer = copy.copy(getattr(pipeline, name))
        tokenizer.model_max_length = context_length
        changes[name] = tokenizer
    if hasattr(pipeline, "tokenizer_max_length"):  # read from the tokenizer when the pipeline was made
        changes["tokenizer_max_length"] = context_length
    arguments = {argument for place in places for argument in _PLACES[place][1]}
    tokenizer = changes[_PLACES[places[0]][0]]
    return LongClipUse(pipeline, changes, _reporting(pipeline.encode_prompt, arguments, tokenizer))


def _require_usable(pipeline: Any, places: Sequence[str], checkpoint_2: object) -> None:
    name = type(pipeline).__name__
    if not places or not hasattr(pipeline, "encode_prompt"):
        raise ConfigError(f"{name} does not encode prompts with a CLIP text encoder, which Long-CLIP would replace")
    if checkpoint_2 is not None and len(places) < 2:
        raise ConfigError(f"{name} has one CLIP text encoder, {places[0]}; leave checkpoint_2 out")
    if "encode_prompt" in vars(pipeline):
        raise ConfigError(f"{name} uses Long-CLIP already, or its encode_prompt was replaced; undo that first")
    for place in places:
        encoder, tokenizer = getattr(pipeline, place), getattr(pipeline, _PLACES[place][0])
        if hasattr(encoder, "_hf_hook"):
            raise ConfigError(f"{place} of {name} is offloaded; call use_long_clip before enabling that")
        if any("lora_" in part for part, _ in encoder.named_modules()):
            raise ConfigError(f"{place} of {name} has a LoRA, which would be lost; load it after use_long_clip")
        if len(tokenizer) != encoder.config.vocab_size:
            raise ConfigError(
                f"{place} of {name} reads {encoder.config.vocab_size} tokens, its tokenizer has {len(tokenizer)};"
                " load textual inversions after use_long_clip"
            )


def _common_length(encoders: Mapping[str, TextEncoder]) -> int:
    lengths = {place: encoder.config.max_position_embeddings for place, encoder in encoders.items()}
    if len(set(lengths.values())) > 1:
        described = " and ".join(f"{length} in {place}" for place, length in lengths.items())
        raise CheckpointError(
            f"both text encoders must read prompts of equal length, but it is {described}; give checkpoint_2"
        )
    return next(iter(lengths.values()))


def _replaced(encoder: TextEncoder, checkpoint: Checkpoint, place: str) -> TextEncoder:
    """A text encoder like `encoder`, with the text tower of a checkpoint, as deep as that of `encoder`."""
    config = checkpoint.model.config
    new, old = config.text_config.to_dict(), encoder.config
    fields = list(_SAME)
    if isinstance(encoder, CLIPTextModelWithProjection):
        new["projection_dim"] = config.projection_dim
        fields.append("projection_dim")
    for field in fields:
        _require_same_clip(new[field] == getattr(old, field), field, new[field], getattr(old, field), place)
    old_layers, new_layers = old.num_hidden_layers, new["num_hidden_layers"]
    _require_same_clip(new_layers >= old_layers, "num_hidden_layers", new_layers, old_layers, place)
    superfluous = tuple(f"encoder.layers.{layer}." for layer in range(old_layers, new_layers))
    tower = checkpoint.model.text_model.state_dict()
    tower = {name: tensor for name, tensor in tower.items() if not name.startswith(superfluous)}
    return _rebuilt(encoder, tower, checkpoint.model.text_projection.weight, config.text_config.eos_token_id)


def _require_same_clip(holds: bool, field: str, new: object, old: object, place: str) -> None:
    if not holds:
        raise CheckpointError(
            f"the checkpoint has {field} {new}, the pipeline's {place} {old};"
            " take a Long-CLIP of the CLIP that the pipeline was trained with"
        )


def _stretched(encoder: TextEncoder) -> TextEncoder:
    """A copy of a text encoder with stretched positions."""
    tower = dict(_tower(encoder).state_dict())
    name = "embeddings.position_embedding.weight"
    tower[name] = stretch_positions(tower[name])
    projection = encoder.text_projection.weight if isinstance(encoder, CLIPTextModelWithProjection) else None
    return _rebuilt(encoder, tower, projection, encoder.config.eos_token_id)


def _rebuilt(
    encoder: TextEncoder, tower: Mapping[str, Tensor], projection: Tensor | None, eos_token_id: int
) -> TextEncoder:
    """A text encoder of the class, config, dtype and device of `encoder`, with copies of other weights."""
    positions = tower["embeddings.position_embedding.weight"].shape[0]
    config = copy.deepcopy(encoder.config)
    config.max_position_embeddings, config.eos_token_id = positions, eos_token_id
    with torch.device("meta"):  # without drawing random weights
        rebuilt = type(encoder)(config)

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to(encoder.device, encoder.dtype, copy=True)

    new_tower = _tower(rebuilt)
    new_tower.load_state_dict({name: copied(tensor) for name, tensor in tower.items()}, assign=True)
    position_ids = torch.arange(positions, device=encoder.device).unsqueeze(0)
    new_tower.embeddings.register_buffer("position_ids", position_ids, persistent=False)
    if projection is not None and isinstance(rebuilt, CLIPTextModelWithProjection):
        rebuilt.text_projection.weight = nn.Parameter(copied(projection))
    return rebuilt.eval()


def _tower(encoder: TextEncoder) -> Any:
    """The text tower of a text encoder; itself, if it has no projection."""
    return getattr(encoder, "text_model", encoder)


def _reporting(encode_prompt: Callable[..., Any], arguments: set[str], tokenizer: Any) -> Callable[..., Any]:
    """Wrap `encode_prompt` to warn about prompts in `arguments` that `tokenizer` cuts."""
    signature = inspect.signature(encode_prompt)

    @functools.wraps(encode_prompt)
    def encode(*args: Any, **kwargs: Any) -> Any:
        limit = tokenizer.model_max_length
        for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
            texts = [value] if isinstance(value, str) else value
            if name in arguments and texts:
                for count in count_tokens(tokenizer, texts):
                    if count > limit:
                        warnings.warn(
                            f"{name}: {count} tokens, of which only the first {limit - 1} and the end are read",
                            stacklevel=2,
                        )
        return encode_prompt(*args, **kwargs)

    return encode
