"""Checkpoints of a run: the model as a Hugging Face directory, and the state that training resumes from."""

from pathlib import Path
from typing import Any

import torch

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.files import whole_directory

MODEL_DIR, STATE_FILE = "checkpoint", "training_state.pt"


def on_cpu(value: Any) -> Any:
    """Copies of the tensors in nested dicts and lists, on the CPU: training may continue and change the originals."""
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
    """Write a checkpoint of a run atomically.

    Args:
        directory: final path; created when the checkpoint is complete.
        checkpoint: configuration of the model, tokenizer and transform; its weights are not used.
        weights: state dict of the model that users load.
        state: tensors and plain values, for `read_state`.
        metadata: where the model comes from, for its manifest.
    """
    with whole_directory(directory) as partial:
        save_checkpoint(checkpoint, partial / MODEL_DIR, metadata, weights)
        torch.save(state, partial / STATE_FILE)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` that `write_state` stored. Tensors are memory-mapped: they are read when they are used."""
    return torch.load(directory / STATE_FILE, weights_only=True, mmap=True)
