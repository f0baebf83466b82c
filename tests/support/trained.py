"""What training runs have on their disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_equal_weights(output: Path, expected: Path) -> None:
    """The same, to float tolerance."""
    actual, wanted = (load_file(path / "checkpoint" / "model.safetensors") for path in (output, expected))
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


def registered_step(output: Path) -> int:
    """Step of the newest checkpoint that a resume would use; 0 before the first one."""
    try:
        snapshot = json.loads((output / ".run" / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, ValueError):  # not there, or half written
        return 0
    newest = snapshot["latest_checkpoint_result"]
    return int(newest["checkpoint_dir_name"].removeprefix("step_")) if newest else 0
