"""Numbers and names that define CLIP and Long-CLIP.

This module imports no other package, so a command can print its help before torch is loaded.
"""

from typing import Literal, get_args

CLIP_CONTEXT_LENGTH = 77
"""Tokens that CLIP reads, start and end token included."""

KEPT_POSITIONS = 20
"""First text positions that stretching keeps unchanged (arXiv 2403.15378, section 3.2)."""

STRETCH_FACTOR = 4
"""Positions that stretching makes of each other one."""

LONG_CLIP_CONTEXT_LENGTH = KEPT_POSITIONS + (CLIP_CONTEXT_LENGTH - KEPT_POSITIONS) * STRETCH_FACTOR
"""Tokens that Long-CLIP reads: 248, start and end token included."""

VOCAB_SIZE = 49408
START_TOKEN, END_TOKEN = 49406, 49407

Activation = Literal["quick_gelu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
"""Activations of CLIP models: of OpenAI's and Long-CLIP's, and of most that open_clip trained."""

Scope = Literal["global", "local"]
"""Rows that principal components are computed from: of the global batch, or of each worker's part of it."""

TowerName = Literal["image", "text"]

MAX_TEXT_CHARS = 100_000
MAX_IMAGE_BYTES = 20 * 2**20
"""Largest text and image file that a served model takes, over HTTP and from MLflow."""
