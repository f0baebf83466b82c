"""The knowledge-preserving stretch: reference numbers, a naive implementation, and frozen rows in training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longclip.checkpoint import new_model
from longclip.stretch import (
    freeze_kept_positions,
    interpolate_positions,
    replace_positions,
    stretch_positions,
    text_positions,
)
from longclip.training.step import parameter_groups
from tests.support.tiny_clip import tiny_config


def naive_stretch(table: Tensor, kept: int, factor: int) -> Tensor:
    """Row by row, as the paper writes it."""
    old = table.double().tolist()
    rows = old[:kept]
    for i in range(kept, len(old)):
        low, high = (old[i], old[i + 1]) if i + 1 < len(old) else (old[i], None)
        for r in range(factor):
            if high is not None:
                rows.append([a + r / factor * (b - a) for a, b in zip(low, high, strict=True)])
            else:  # extrapolate with the last difference
                rows.append([a + r / factor * (a - b) for a, b in zip(low, old[i - 1], strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def test_parity_with_the_official_code(vectors: Path) -> None:
    table = load_file(vectors / "openai_tiny_clip.safetensors")["positional_embedding"].float()
    expected = load_file(vectors / "official_longclip_tiny.safetensors")["stretched_positional_embedding"]
    stretched = stretch_positions(table)
    assert stretched.shape == (248, 64)
    assert torch.equal(stretched[:20], table[:20])
    assert (stretched - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("length", [2, 5, 77])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_equals_naive_loops(length: int, factor: int, kept: str) -> None:
    kept_rows = {"none": 0, "some": length // 2, "all": length}[kept]
    table = torch.randn(length, 6, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    stretched = stretch_positions(table, kept_rows, factor)
    expected = naive_stretch(table, kept_rows, factor)
    assert stretched.shape == expected.shape == (kept_rows + (length - kept_rows) * factor, 6)
    torch.testing.assert_close(stretched, expected, rtol=0, atol=1e-12)
    assert torch.equal(stretched[:kept_rows], table[:kept_rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    table = torch.randn(10, 4).to(dtype)
    stretched = stretch_positions(table, 3, 2)
    assert stretched.dtype == dtype
    torch.testing.assert_close(stretched, naive_stretch(table, 3, 2).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "kept", "factor", "named"),
    [
        ((1, 4), 0, 4, "weight"),
        ((8,), 0, 4, "weight"),
        ((8, 4), -1, 4, "kept_positions"),
        ((8, 4), 9, 4, "kept_positions"),
        ((8, 4), 2, 0, "stretch_factor"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], kept: int, factor: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        stretch_positions(torch.zeros(shape), kept, factor)


def test_uniform_interpolation() -> None:
    table = torch.randn(77, 5, dtype=torch.float64)
    resized = interpolate_positions(table, 248)
    assert resized.shape == (248, 5)
    torch.testing.assert_close(resized[[0, -1]], table[[0, -1]], rtol=0, atol=1e-12)
    position = torch.arange(248, dtype=torch.float64) * 76 / 247
    left = position.floor().long().clamp(max=75)
    expected = torch.lerp(table[left], table[left + 1], (position - left)[:, None])
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-12)
    assert torch.equal(interpolate_positions(table, 77), table)
    assert interpolate_positions(table.half(), 100).dtype == torch.float16


def test_replaced_positions_reach_the_model() -> None:
    torch.manual_seed(0)
    model = new_model(tiny_config(77)).model.eval()
    ids = torch.randint(1, 49406, (2, 20))
    ids[:, -1] = 49407
    before = model.get_text_features(input_ids=ids).pooler_output
    replace_positions(model, stretch_positions(text_positions(model)))
    assert model.config.text_config.max_position_embeddings == 248
    assert text_positions(model).requires_grad
    # A text of 20 tokens sees kept rows only: its feature is the same number, not a similar one.
    assert torch.equal(model.get_text_features(input_ids=ids).pooler_output, before)
    longest = torch.full((1, 248), 49407)
    assert model.get_text_features(input_ids=longest).pooler_output.shape == (1, 24)
    assert not any("position_ids" in name for name in model.state_dict())


def test_kept_rows_stay_bit_equal_in_training() -> None:
    torch.manual_seed(0)
    model = new_model(tiny_config(77)).model
    replace_positions(model, stretch_positions(text_positions(model)))
    freeze_kept_positions(model, 20)
    before = text_positions(model).detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=1e-2)
    ids = torch.randint(1, 49406, (2, 248))
    ids[:, -1] = 49407
    for _ in range(3):
        optimizer.zero_grad()
        model.get_text_features(input_ids=ids).pooler_output.square().sum().backward()
        optimizer.step()
    after = text_positions(model).detach()
    assert torch.equal(after[:20], before[:20])
    assert (after[20:] != before[20:]).any(dim=1).all()
