"""Locked towers and layers: they stay bit for bit, cost no optimizer state, and the others train as they would."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longclip.constants import TowerName
from longclip.errors import ConfigError
from longclip.stretch import text_positions
from longclip.training.freeze import is_locked, lock_tower, tower_groups
from longclip.training.step import PairEncoder, backward, parameter_groups
from pipelines.training.initial_model import initial_checkpoint
from pipelines.training.settings import FinetuneSettings
from tests.support.training_steps import LOSS, assert_same_gradients, gradients, share_of_batch, tiny_encoder

TOWERS: tuple[TowerName, TowerName] = ("image", "text")


def train(encoder: PairEncoder, steps: int = 3, chunk_size: int | None = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameter_groups(encoder.model, weight_decay=0.5), lr=1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(encoder, share_of_batch(1, 0), LOSS, chunk_size)
        optimizer.step()
    return optimizer


def parameters_of(modules: list[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("unlocked", [0, 1, 2])
@pytest.mark.parametrize("tower", TOWERS)
def test_only_unlocked_groups_change(tower: TowerName, unlocked: int, chunk_size: int | None) -> None:
    encoder = tiny_encoder()
    lock_tower(encoder.model, tower, unlocked)
    groups = tower_groups(encoder.model, tower)
    locked = parameters_of([module for group in groups[: len(groups) - unlocked] for module in group])
    before = {parameter: parameter.detach().clone() for parameter in encoder.parameters()}
    optimizer = train(encoder, chunk_size=chunk_size)
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[parameter]) == (parameter in locked), name
        assert (parameter in optimizer.state) == (parameter not in locked), name
    assert all(parameter.grad is None for parameter in locked)
    if tower == "image" or unlocked:
        assert torch.equal(text_positions(encoder.model)[:20], before[text_positions(encoder.model)][:20])


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("unlocked", [0, 2])
@pytest.mark.parametrize("tower", TOWERS)
def test_locking_does_not_change_other_gradients(tower: TowerName, unlocked: int, chunk_size: int | None) -> None:
    whole, part = tiny_encoder(), tiny_encoder()
    lock_tower(part.model, tower, unlocked)
    losses = backward(whole, share_of_batch(1, 0), LOSS)
    torch.testing.assert_close(backward(part, share_of_batch(1, 0), LOSS, chunk_size), losses)
    found = gradients(part)
    assert 0 < len(found) < len(gradients(whole))
    assert_same_gradients(found, {name: gradients(whole)[name] for name in found}, 1e-10)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_locked_tower_runs_once_and_without_a_graph(tower: TowerName) -> None:
    encoder = tiny_encoder()
    lock_tower(encoder.model, tower)
    rows, with_graph = 0, []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal rows
        rows += len(output)
        with_graph.append(output.requires_grad)

    first, *_ = tower_groups(encoder.model, tower)
    first[0].register_forward_hook(note)
    backward(encoder, share_of_batch(1, 0), LOSS, chunk_size=5)
    assert rows == (12 if tower == "image" else 24)  # captions and summaries; not again for the gradients
    assert not any(with_graph)


def test_groups_have_every_parameter_once() -> None:
    model = tiny_encoder().model
    groups = [group for tower in TOWERS for group in tower_groups(model, tower)]
    assert len(groups) == 8  # twice: embeddings, two layers, projection
    found = [parameter for group in groups for module in group for parameter in module.parameters()]
    assert len(found) == len(set(found))
    assert set(model.parameters()) - set(found) == {model.logit_scale}
    assert not is_locked(model, "image")
    with pytest.raises(ValueError, match=r"0\.\.3 .* got 4"):
        lock_tower(model, "text", 4)


# --- as settings ---


def settings_of(**model: Any) -> FinetuneSettings:
    sizes = {"text": {"layers": 2, "width": 32}, "vision": {"layers": 2, "width": 32}, "embedding_dim": 24}
    return FinetuneSettings.model_validate({"input": "x", "model": {"architecture": sizes, **model}})


def test_settings_lock_towers() -> None:
    model = initial_checkpoint(settings_of(lock_image=True, lock_text=True, lock_text_unlocked_groups=2)).model
    assert is_locked(model, "image")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    last, projection = "text_model.encoder.layers.1.", "text_projection.weight"
    assert {"logit_scale", projection, "text_model.final_layer_norm.bias", f"{last}mlp.fc1.weight"} <= trained
    assert all(name.startswith((last, "logit_scale", projection, "text_model.final_layer_norm")) for name in trained)
    with pytest.raises(ConfigError, match="lock_text_unlocked_groups=9"):
        initial_checkpoint(settings_of(lock_text=True, lock_text_unlocked_groups=9))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"lock_image_unlocked_groups": 2}, "add model.lock_image=true"),
        ({"lock_image": True, "lock_text": True}, "nothing to train"),
    ],
)
def test_invalid_locks_are_rejected(model: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        settings_of(**model)
