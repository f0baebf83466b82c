"""The model that a run starts from: which positions it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longclip.checkpoint import new_model, save_checkpoint
from longclip.stretch import text_positions
from pipelines.training.initial_model import initial_checkpoint
from pipelines.training.settings import FinetuneSettings
from tests.support.tiny_clip import tiny_config

NEW = {"text": {"layers": 1, "width": 32}, "vision": {"layers": 1, "width": 32}, "context_length": 248}


@pytest.mark.parametrize(
    ("context_length", "model", "frozen"),
    [
        (77, {"positions": "stretch"}, 20),
        (77, {"positions": "stretch", "kept_positions": 5}, 5),
        (77, {"positions": "interpolate"}, 0),
        (77, {"positions": "keep"}, 0),
        (248, {"positions": "keep"}, 20),
        (None, {"positions": "keep", "architecture": NEW}, 0),
    ],
)
def test_kept_positions_are_frozen(
    context_length: int | None, model: dict[str, Any], frozen: int, tmp_path: Path
) -> None:
    if context_length:
        save_checkpoint(new_model(tiny_config(context_length)), tmp_path / "base", {})
        model = {"base": str(tmp_path / "base"), **model}
    clip = initial_checkpoint(FinetuneSettings.model_validate({"input": "x", "model": model})).model
    positions = clip.text_model.embeddings.position_embedding
    positions(torch.arange(60).unsqueeze(0)).sum().backward()
    gradient = text_positions(clip).grad
    assert gradient is not None
    trained = gradient.abs().sum(1) > 0
    assert trained[:60].tolist() == [False] * frozen + [True] * (60 - frozen)
