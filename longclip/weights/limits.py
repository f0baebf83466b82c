"""What other formats assume about a model, checked before anything is written."""

from transformers import CLIPConfig

from longclip.checkpoint import Checkpoint
from longclip.constants import ACTIVATIONS, END_TOKEN, VOCAB_SIZE
from longclip.errors import CheckpointError
from longclip.images import CLIP_MEAN, CLIP_STD
from longclip.weights.shapes import HEAD_WIDTH

LAYER_NORM_EPS = 1e-5
LEGACY_END_TOKEN = 2
"""In the configs of OpenAI's conversions; transformers then reads the feature at the highest token, the end token."""


def require(holds: bool, what: str, allowed: str) -> None:
    """Raise a `CheckpointError` that says what the model has and what the format can hold, unless it `holds`."""
    if not holds:
        raise CheckpointError(f"the model has {what}; this format can only hold {allowed}")


def require_clip(config: CLIPConfig) -> str:
    """Check what every format outside transformers assumes; returns the activation of both towers."""
    text, vision = config.text_config, config.vision_config
    require(text.hidden_act == vision.hidden_act, f"{text.hidden_act} and {vision.hidden_act}", "one activation")
    require(text.hidden_act in ACTIVATIONS, f"the activation {text.hidden_act}", " or ".join(ACTIVATIONS))
    for tower in (text, vision):
        require(tower.layer_norm_eps == LAYER_NORM_EPS, f"layer_norm_eps {tower.layer_norm_eps}", f"{LAYER_NORM_EPS:g}")
    require(
        text.vocab_size == VOCAB_SIZE and text.eos_token_id in (END_TOKEN, LEGACY_END_TOKEN),
        f"a vocabulary of {text.vocab_size} tokens that ends texts with {text.eos_token_id}",
        f"CLIP's vocabulary of {VOCAB_SIZE} tokens, where {END_TOKEN} ends a text",
    )
    return text.hidden_act


def require_openai_tower_shapes(config: CLIPConfig) -> None:
    """Check what the code of OpenAI and of Long-CLIP computes from widths instead of reading it from a config."""
    for name, tower in (("text", config.text_config), ("image", config.vision_config)):
        width = tower.hidden_size
        require(
            tower.num_attention_heads == width // HEAD_WIDTH,
            f"{tower.num_attention_heads} attention heads in its {name} tower of width {width}",
            f"heads of width {HEAD_WIDTH}, here {width // HEAD_WIDTH}",
        )
        require(
            tower.intermediate_size == 4 * width,
            f"an MLP of width {tower.intermediate_size} in its {name} tower of width {width}",
            f"one four times as wide, here {4 * width}",
        )
    vision = config.vision_config
    require(
        vision.image_size % vision.patch_size == 0,
        f"images of {vision.image_size} pixels in patches of {vision.patch_size}",
        "image sizes that are a multiple of the patch size",
    )


def require_openai_code(checkpoint: Checkpoint, positions: int, otherwise: str) -> None:
    """Check everything that is fixed in the code of OpenAI and of Long-CLIP.

    Args:
        checkpoint: the model.
        positions: text positions that are fixed in the code.
        otherwise: what to do with a model of another length, for the error.
    """
    length, transform = checkpoint.context_length, checkpoint.transform
    require(length == positions, f"{length} text positions", f"{positions}, which its code fixes; {otherwise}")
    activation = require_clip(checkpoint.model.config)
    require(activation == "quick_gelu", f"the activation {activation}", "quick_gelu")
    require_openai_tower_shapes(checkpoint.model.config)
    require(
        (transform.mean, transform.std) == (CLIP_MEAN, CLIP_STD),
        f"the image mean {transform.mean} and deviation {transform.std}",
        "CLIP's own, which its code fixes",
    )
