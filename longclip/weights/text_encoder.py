"""A text encoder alone, in one safetensors file: what ComfyUI and the web UIs keep in `models/text_encoders`."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig

from longclip.checkpoint import Checkpoint
from longclip.errors import CheckpointError
from longclip.weights.limits import require
from longclip.weights.shapes import Hints, StateDict

# The text towers that these programs know, by their number of layers: name, width, heads and activation.
_KNOWN_TOWERS = {
    12: ("CLIP-L", 768, 12, "quick_gelu"),
    24: ("CLIP-H", 1024, 16, "gelu"),
    32: ("bigG", 1280, 20, "gelu"),
}


def complete(text: StateDict, hints: Hints, base: Checkpoint) -> tuple[dict[str, Tensor], Hints]:
    """A text encoder's weights and hints, completed with those of a CLIP.

    Args:
        text: weights of the text tower, perhaps with its projection.
        hints: what the config file next to them says.
        base: the CLIP whose image tower, logit scale and, if `text` has none, text projection are taken.

    Raises:
        CheckpointError: the two have different activations.
    """
    known, config = base.model.state_dict(), base.model.config
    activation = config.vision_config.hidden_act
    if hints.activation not in (None, activation):
        raise CheckpointError(
            f"it has the activation {hints.activation}, the CLIP of --image-tower {activation}: they do not belong"
            " together"
        )
    state = {name: tensor for name, tensor in known.items() if not name.startswith("text_model.")} | dict(text)
    norm = "text_model.final_layer_norm.weight"
    if norm in text and text[norm].shape == known[norm].shape:  # no shape implies the number of heads
        hints = replace(hints, text_heads=hints.text_heads or config.text_config.num_attention_heads)
    hints = replace(
        hints,
        activation=activation,
        image_size=config.vision_config.image_size,
        vision_heads=config.vision_config.num_attention_heads,
        mean=base.transform.mean,
        std=base.transform.std,
    )
    return state, hints


def write(checkpoint: Checkpoint, file: Path) -> str:
    """Write the text tower and its projection under their Hugging Face names.

    Returns:
        Where to put it.

    Raises:
        CheckpointError: the programs would mistake the tower for a known one with another activation or other heads.
    """
    known = _known_tower(checkpoint.model.config.text_config)
    state = checkpoint.model.state_dict()
    text = {name: tensor for name, tensor in state.items() if name.startswith(("text_model.", "text_projection."))}
    save_file(text, file, metadata={"format": "pt"})
    if known is None:
        return "no published image model has a text tower of this shape: only a program that knows it can load it"
    return f"put it into models/text_encoders of ComfyUI; it is read as {known}"


def _known_tower(config: CLIPTextConfig) -> str | None:
    name, width, heads, activation = _KNOWN_TOWERS.get(config.num_hidden_layers, (None, None, None, None))
    if config.hidden_size != width:
        return None
    require(
        (config.num_attention_heads, config.hidden_act) == (heads, activation),
        f"{config.num_attention_heads} heads and {config.hidden_act} in a text tower of the shape of {name}",
        f"such a tower with {heads} heads and {activation}, which no name or shape in the file says",
    )
    return name
