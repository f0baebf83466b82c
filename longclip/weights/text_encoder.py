"""A text encoder alone, in one safetensors file: what ComfyUI and the web UIs keep in `models/text_encoders`."""

from pathlib import Path

from safetensors.torch import save_file
from transformers import CLIPTextConfig

from longclip.checkpoint import Checkpoint
from longclip.weights.limits import require

# The text towers that the programs know, told apart by their number of layers: width, heads and activation.
_KNOWN_TOWERS = {
    12: ("CLIP-L", 768, 12, "quick_gelu"),
    24: ("CLIP-H", 1024, 16, "gelu"),
    32: ("bigG", 1280, 20, "gelu"),
}


def write_text_encoder(checkpoint: Checkpoint, file: Path) -> str:
    """Write the text tower and its projection under their Hugging Face names.

    Returns:
        Where to put it.

    Raises:
        CheckpointError: the programs would take the tower for a known one with another activation or other heads.
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
        f"such a tower with {heads} heads and {activation}, which no name or shape in the file tells",
    )
    return name
