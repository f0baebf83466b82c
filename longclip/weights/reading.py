"""Reading a CLIP from whatever holds one: files and directories of any layout, or a hub name."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from longclip.checkpoint import Checkpoint, load_checkpoint, load_transform
from longclip.constants import ACTIVATIONS
from longclip.errors import CheckpointError, ConfigError
from longclip.images import ImageTransform
from longclip.tokenizer import build_tokenizer
from longclip.weights import hugging_face, onnx, open_clip, sentence_transformers, text_encoder
from longclip.weights.layouts import bare_names, detect_layout, to_huggingface
from longclip.weights.shapes import HEAD_WIDTH, Hints, build_model, infer_config
from longclip.weights.tensor_files import read_tensors

_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx")


@dataclass(frozen=True)
class Conversion:
    """A converted CLIP and facts about its source."""

    checkpoint: Checkpoint
    source_format: str
    """`openai`, `long-clip`, `open_clip`, `huggingface`, `text-encoder`, `sentence-transformers` or `onnx`."""
    weights: Path | None
    """The file that the weights came from; None for a hub name or for weights in several files."""
    activation_assumed: bool
    """Whether the source does not say the activation, so that OpenAI's was taken."""


def convert_checkpoint(
    source: str | Path, activation: str | None = None, image_tower: str | Path | None = None
) -> Checkpoint:
    """Load a CLIP from any format.

    Args:
        source: a weights file (OpenAI, TorchScript or not; official Long-CLIP; open_clip; Hugging Face; a text encoder
            alone), a directory of open_clip, Hugging Face, sentence-transformers or our ONNX export, or a hub name.
        activation: `quick_gelu` or `gelu`, for weights without a config that says it; None means `quick_gelu`.
        image_tower: for a text encoder alone, the CLIP that completes it: its image tower, its logit scale and, if
            the text encoder has no text projection, that too. Any source that this function reads.

    Returns:
        The CLIP in float32 and evaluation mode.

    Raises:
        CheckpointError: there is nothing, it is not a CLIP, it is damaged, or reading it would run foreign Python code.
        ConfigError: `activation` is unknown or contradicts the source's config.
    """
    return read_source(source, activation, image_tower).checkpoint


def read_source(source: str | Path, activation: str | None = None, image_tower: str | Path | None = None) -> Conversion:
    """Like `convert_checkpoint`, with facts about the source."""
    if activation not in (None, *ACTIVATIONS):
        raise ConfigError(f"activation '{activation}' is unknown; allowed are {', '.join(ACTIVATIONS)}")
    path = Path(source).expanduser()
    if (path / sentence_transformers.MODULES).is_file():
        module = sentence_transformers.clip_module(path)
        if module != path:
            return replace(read_source(module, activation, image_tower), source_format="sentence-transformers")
    weights = _find_weights(path) if path.is_dir() else path
    if weights is None or not (weights.exists() or path.suffix in _WEIGHT_SUFFIXES):
        if image_tower is not None:
            raise _second_image_tower(source)
        return _read_hugging_face(source, activation)
    if not weights.is_file():
        raise CheckpointError(f"weights '{source}': no such file")
    try:
        return _read_weights(weights, activation, image_tower)
    except CheckpointError as error:
        raise CheckpointError(f"weights '{weights}': {error}") from error


def _second_image_tower(source: str | Path) -> ConfigError:
    return ConfigError(f"'{source}' is a whole CLIP; --image-tower only completes a text encoder, leave it out")


def _find_weights(directory: Path) -> Path | None:
    """The weights file to read from a directory; None if transformers can load the directory itself."""
    complete = (directory / hugging_face.CONFIG).is_file() and not hugging_face.is_text_encoder(directory)
    for name in (*hugging_face.WEIGHTS, *open_clip.WEIGHTS, *hugging_face.OTHER_WEIGHTS):
        if (directory / name).is_file():
            return None if complete and name in hugging_face.WEIGHTS else directory / name
    if complete:
        return None
    names = ", ".join((*hugging_face.WEIGHTS, *open_clip.WEIGHTS, *hugging_face.OTHER_WEIGHTS))
    raise CheckpointError(f"directory '{directory}' holds no weights; looked for {names}; give the file itself")


def _read_hugging_face(source: str | Path, activation: str | None) -> Conversion:
    path = Path(source).expanduser()
    checkpoint = load_checkpoint(path if path.is_dir() else source)
    _choose_activation(activation, checkpoint.model.config.text_config.hidden_act)
    weights = path / hugging_face.WEIGHTS[0]
    source_format = "onnx" if (path / onnx.TEXT_GRAPH).is_file() else "huggingface"
    return Conversion(checkpoint, source_format, weights if weights.is_file() else None, False)


def _read_weights(weights: Path, activation: str | None, image_tower: str | Path | None) -> Conversion:
    state = bare_names(read_tensors(weights))
    layout = detect_layout(state)
    hints = _read_hints(weights.parent, layout)
    if layout == "text-encoder":
        if image_tower is None:
            raise CheckpointError("it is a text encoder alone; name the CLIP that completes it with --image-tower")
        state, hints = text_encoder.complete(state, hints, convert_checkpoint(image_tower))
    elif image_tower is not None:
        raise _second_image_tower(weights)
    chosen, assumed = _choose_activation(activation, hints.activation)
    state = to_huggingface(state)
    model = build_model(state, infer_config(state, chosen, hints))
    config = model.config
    if layout == "huggingface":
        transform = load_transform(weights.parent, config)
    else:
        transform = ImageTransform(config.vision_config.image_size, hints.mean, hints.std)
    checkpoint = Checkpoint(model, build_tokenizer(config.text_config.max_position_embeddings), transform)
    return Conversion(checkpoint, hints.source_format or layout, weights, assumed)


def _read_hints(directory: Path, layout: str) -> Hints:
    """Read the config file in `directory` that belongs to weights of a layout, if there is one.

    Raises:
        CheckpointError: it cannot be understood, or it says that the weights are not those of a CLIP.
    """
    if layout == "long-clip":
        return Hints(vision_head_width=HEAD_WIDTH)
    config = hugging_face if layout in ("huggingface", "text-encoder") else open_clip
    path = directory / config.CONFIG
    if not path.is_file():
        return Hints()
    try:
        return config.read_hints(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make sense of {path.name} next to it: {error!r}") from error


def _choose_activation(requested: str | None, known: str | None) -> tuple[str, bool]:
    """The activation, and whether it had to be assumed."""
    if requested and known and requested != known:
        raise ConfigError(f"activation '{requested}' contradicts the source's config, which has '{known}'")
    return requested or known or ACTIVATIONS[0], not (requested or known)
