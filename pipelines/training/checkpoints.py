"""What a checkpoint of a run holds: the model as a Hugging Face directory, and all that training needs to go on."""

from pathlib import Path
from typing import Any

import torch

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.files import whole_directory

MODEL_DIR, STATE_FILE = "checkpoint", "training_state.pt"


def on_cpu(value: Any) -> Any:
    """Copies of the tensors in nested dicts and lists, on the CPU: training may go on and change the originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return value


def write_state(
    directory: Path, checkpoint: Checkpoint, weights: dict[str, Any], state: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Write a checkpoint of a run, whole.

    Args:
        directory: its final place.
        checkpoint: model (of which the configuration counts only), tokenizer and transform.
        weights: state dict of the model that users load.
        state: tensors and plain values, for `read_state`.
        metadata: facts about the origin, for the model's manifest.
    """
    with whole_directory(directory) as aside:
        save_checkpoint(checkpoint, aside / MODEL_DIR, metadata, weights)
        torch.save(state, aside / STATE_FILE)


def read_state(directory: Path) -> dict[str, Any]:
    """What `write_state` was given as `state`; its tensors are read from the file when they are needed."""
    return torch.load(directory / STATE_FILE, weights_only=True, mmap=True)
