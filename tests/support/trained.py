"""Results of training runs."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_equal_weights(output: Path, expected: Path) -> None:
    """The same, to float tolerance."""
    ours, theirs = (load_file(path / "checkpoint" / "model.safetensors") for path in (output, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
