"""Which layout weights have, by their names, and any layout as Hugging Face's."""

from torch import Tensor

from longclip.checkpoint import SIGLIP_REASON
from longclip.errors import CheckpointError
from longclip.weights import long_clip
from longclip.weights.openai import from_openai, own_float
from longclip.weights.shapes import StateDict, some

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning


def bare_names(state: StateDict) -> dict[str, Tensor]:
    """The weights under plain names.

    Prefixes of training wrappers and of open_clip's `CustomTextCLIP` are removed; the prefix `text_model.`, which a
    `CLIPTextModel` saved by transformers 5 lacks, is added.
    """
    names = dict(state)
    for prefix in _WRAPPERS * 2:
        if names and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    if "text.token_embedding.weight" in names:
        names = {name.removeprefix("text."): tensor for name, tensor in names.items()}
    if "embeddings.token_embedding.weight" in names:
        names = {f"text_model.{name}": tensor for name, tensor in names.items()}
    return names


def detect_layout(state: StateDict) -> str:
    """`openai`, `long-clip`, `huggingface` or `text-encoder`, from the plain names of weights.

    Raises:
        CheckpointError: the weights are of something else; for a CLIP that cannot be converted, the reason.
    """
    if any(name.startswith("visual.layer1.") for name in state):
        raise CheckpointError("a ResNet CLIP (RN50, ...) cannot be converted: Hugging Face CLIP has only ViT towers")
    if any(name.endswith((".head.probe", "_pool.probe", "_pool.latent")) for name in state):
        if "logit_bias" in state or any(name.startswith("vision_model.") for name in state):
            raise CheckpointError(SIGLIP_REASON)
        raise CheckpointError(
            "its image tower pools with attention, as that of PE-Core does; the original CLIP reads the class token"
        )
    if any(name.startswith(("visual.trunk.", "text.transformer.")) for name in state):
        raise CheckpointError(
            "an open_clip model with a timm or Hugging Face tower does not have the layout of the original CLIP"
        )
    if any(name.startswith("vision_model.") for name in state):
        return "huggingface"
    if any(name.startswith("text_model.") for name in state):
        return "text-encoder"
    if "visual.conv1.weight" in state and "token_embedding.weight" in state:
        return "long-clip" if long_clip.TRAINED in state else "openai"
    raise CheckpointError(f"the weights are not those of a CLIP; they begin with {some(state)}")


def to_huggingface(state: StateDict) -> dict[str, Tensor]:
    """Weights under the names, and in the shapes, of `transformers.CLIPModel`, in float32.

    The mapping is linear, so it works for gradients as well as for weights.

    Args:
        state: weights under plain names, of any layout but `text-encoder`.

    Raises:
        CheckpointError: weights are missing or unknown.
    """
    layout = detect_layout(state)
    if layout == "huggingface":
        return {name: own_float(tensor) for name, tensor in state.items() if not name.endswith(".position_ids")}
    return from_openai(long_clip.merge_positions(state) if layout == "long-clip" else state)
