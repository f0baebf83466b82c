"""What is done to the layers of the towers for speed or memory: the same losses and gradients."""

import shutil
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from longclip.training.compiling import compile_layers
from longclip.training.step import PairEncoder, backward
from tests.support.training_steps import (
    LOSS,
    assert_same_gradients,
    gradients,
    most_bytes_held,
    share_of_batch,
    tiny_encoder,
)


def step(encoder: PairEncoder, chunk_size: int | None = None) -> dict[str, Tensor]:
    return backward(encoder, share_of_batch(1, 0), LOSS, chunk_size)


# --- activation checkpointing ---


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_checkpointing_changes_no_gradient(chunk_size: int | None, dtype: torch.dtype, tolerance: float) -> None:
    plain, checkpointed = tiny_encoder(dtype), tiny_encoder(dtype, checkpoint_layers=True)
    torch.testing.assert_close(step(checkpointed, chunk_size), step(plain, chunk_size), rtol=tolerance, atol=0)
    assert_same_gradients(gradients(checkpointed), gradients(plain), tolerance)


def test_checkpointing_recomputes_layers_and_saves_memory() -> None:
    calls: list[nn.Module] = []

    def times(encoder: PairEncoder) -> list[int]:
        calls.clear()
        towers = encoder.model.vision_model, encoder.model.text_model
        blocks = [layer.mlp for tower in towers for layer in tower.encoder.layers]
        for block in blocks:
            block.register_forward_pre_hook(lambda module, inputs: calls.append(module))
        step(encoder)
        return [calls.count(block) for block in blocks]

    micro_batches = 6  # 24 texts, 4 at once
    assert times(tiny_encoder()) == [1, 1, micro_batches, micro_batches]
    # The last layer of a tower runs at one row; holding that is cheap.
    assert times(tiny_encoder(checkpoint_layers=True)) == [2, 1, 2 * micro_batches, micro_batches]

    plain, checkpointed = tiny_encoder(), tiny_encoder(checkpoint_layers=True)
    assert most_bytes_held(lambda: step(checkpointed)) < 0.75 * most_bytes_held(lambda: step(plain))


# --- compiled layers ---


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Iterator[tuple[PairEncoder, CompileCounterWithBackend]]:
    """A compiled encoder, and what counts its graphs."""
    torch._dynamo.reset()
    counter, encoder = CompileCounterWithBackend(request.param), tiny_encoder(torch.float32).train()
    compile_layers(encoder.model, counter)
    yield encoder, counter
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", ["eager", "aot_eager"], indirect=True)
def test_compiled_layers_give_equal_results(compiled: tuple[PairEncoder, CompileCounterWithBackend]) -> None:
    encoder, counter = compiled
    plain = tiny_encoder(torch.float32).train()
    names = list(encoder.state_dict())
    for chunk_size, again in product((None, 5), (False, True)):
        encoder.checkpoint_layers = again
        torch.testing.assert_close(step(encoder, chunk_size), step(plain, chunk_size), rtol=1e-6, atol=0)
        assert_same_gradients(gradients(encoder), gradients(plain), 1e-6)
        encoder.zero_grad()
        plain.zero_grad()
    assert counter.frame_count > 0
    assert list(encoder.state_dict()) == names == list(plain.state_dict())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_compiled_kernels_give_equal_results() -> None:
    torch._dynamo.reset()
    compiled, plain = tiny_encoder().train(), tiny_encoder().train()
    compile_layers(compiled.model)
    for chunk_size in (None, 5):
        torch.testing.assert_close(step(compiled, chunk_size), step(plain, chunk_size), rtol=1e-9, atol=0)
    assert_same_gradients(gradients(compiled), gradients(plain), 1e-9)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", ["aot_eager"], indirect=True)
def test_number_of_graphs_does_not_grow_with_text_lengths(
    compiled: tuple[PairEncoder, CompileCounterWithBackend],
) -> None:
    encoder, counter = compiled
    lengths: set[int] = set()
    encoder.model.text_model.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.add(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    graphs, seen = [], []
    for seed in range(6):
        for chunk_size in (None, 5, 2):
            backward(encoder, share_of_batch(1, 0, seed), LOSS, chunk_size)
        graphs.append(counter.frame_count)
        seen.append(len(lengths))
    assert seen[-1] >= 2 * seen[0] > 10  # new lengths keep coming
    assert graphs[-1] == graphs[1] <= 8  # graphs do not
