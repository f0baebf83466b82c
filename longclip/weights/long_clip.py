"""Files of the official Long-CLIP code (beichenzbc/Long-CLIP): OpenAI's layout with two text position tables.

That code reads rows 0 to 19 from the frozen table `positional_embedding` and the others from the trained one,
`positional_embedding_res`.
"""

from pathlib import Path

import torch
from torch import Tensor

from longclip.checkpoint import Checkpoint
from longclip.constants import KEPT_POSITIONS, LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import CheckpointError
from longclip.weights.limits import require_openai_code
from longclip.weights.openai import to_openai
from longclip.weights.shapes import StateDict

FROZEN, TRAINED = "positional_embedding", "positional_embedding_res"


def merge_positions(state: StateDict) -> dict[str, Tensor]:
    """The weights with one position table: rows 0 to 19 of the frozen table, the others of the trained one.

    Raises:
        CheckpointError: the two tables differ in shape.
    """
    merged = dict(state)
    frozen, trained = merged[FROZEN], merged.pop(TRAINED)
    if frozen.ndim != 2 or frozen.shape != trained.shape:
        raise CheckpointError(f"{FROZEN} {tuple(frozen.shape)} and {TRAINED} {tuple(trained.shape)} differ in shape")
    merged[FROZEN] = torch.cat([frozen[:KEPT_POSITIONS], trained[KEPT_POSITIONS:]])
    return merged


def write(checkpoint: Checkpoint, file: Path) -> str:
    """Write a state dict of the official Long-CLIP code. Both tables are whole, so its masks do not matter.

    Returns:
        How to load it.

    Raises:
        CheckpointError: the official code would build a different model from these weights.
    """
    require_openai_code(checkpoint, LONG_CLIP_CONTEXT_LENGTH, "other lengths fit every other format but `openai`")
    state = to_openai(checkpoint.model.state_dict())
    torch.save({**state, TRAINED: state[FROZEN].clone()}, file)
    return 'longclip.load("{path}")'
