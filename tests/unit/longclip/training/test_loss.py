"""The training objective: the official losses and gradients, and the same on several workers."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel

from longclip.encode import encode_image, encode_text, unit
from longclip.stretch import freeze_kept_positions, stretch_checkpoint
from longclip.tokenizer import TokenBatch
from longclip.training.loss import LossConfig, contrastive_loss, long_clip_losses
from longclip.training.pcm import primary_components
from longclip.training.step import ImageTextBatch, backward, learning_rate_factor
from longclip.weights.layouts import to_huggingface
from longclip.weights.reading import convert_checkpoint
from tests.support.training_steps import (
    LOSS,
    assert_same_gradients,
    gradients,
    most_bytes_held,
    share_of_batch,
    tiny_encoder,
)
from tests.support.workers import run_workers

# --- against the official code ---


def batch_of(input_ids: Tensor) -> TokenBatch:
    """Zero-padded ids as a token batch."""
    lengths = (input_ids != 0).sum(1)
    return TokenBatch(input_ids.long(), lengths, lengths)


@pytest.fixture(scope="module")
def official_step(vectors: Path) -> tuple[CLIPModel, dict[str, Tensor], dict[str, Tensor]]:
    """Model with gradients, losses, and the recorded tensors of one official training step."""
    recorded = load_file(vectors / "official_longclip_tiny.safetensors")
    checkpoint = stretch_checkpoint(convert_checkpoint(vectors / "openai_tiny_clip.safetensors"))
    model = checkpoint.model
    freeze_kept_positions(model)
    losses = long_clip_losses(
        unit(encode_image(model, recorded["pixel_values"])),
        unit(encode_text(model, batch_of(recorded["long_ids"]))),
        unit(encode_text(model, batch_of(recorded["short_ids"]))),
        model.logit_scale.exp(),
        LossConfig(summary_loss_weight=1.0),
    )
    losses["loss"].backward()
    return model, losses, recorded


def test_losses_equal_the_official_ones(official_step: tuple[CLIPModel, dict[str, Tensor], dict[str, Tensor]]) -> None:
    _, losses, recorded = official_step
    long, short = recorded["loss_long"].item(), recorded["loss_short"].item()
    assert losses["caption_loss"].item() == pytest.approx(long, abs=1e-5)
    assert losses["summary_loss"].item() == pytest.approx(short, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(long + short, abs=2e-5)


def test_gradients_equal_the_official_ones(
    official_step: tuple[CLIPModel, dict[str, Tensor], dict[str, Tensor]], vectors: Path
) -> None:
    model, _, recorded = official_step
    official = {name.removeprefix("grad."): g for name, g in recorded.items() if name.startswith("grad.")}
    official["positional_embedding"] = torch.zeros_like(official["positional_embedding_res"])
    parameters = dict(model.named_parameters())
    # Gradients are recorded for some layers; the mapping wants whole models, so the others are filled up to be skipped.
    shapes = load_file(vectors / "openai_tiny_clip.safetensors")
    filled = {name: torch.full(t.shape, torch.nan) for name, t in shapes.items() if t.is_floating_point()} | official
    compared = 0
    for name, expected in to_huggingface(filled).items():
        if not expected.isnan().any():
            gradient = parameters[name].grad
            assert gradient is not None
            assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
            compared += 1
    assert compared >= len(official) - 1
    positions = parameters["text_model.embeddings.position_embedding.weight"].grad
    assert positions is not None
    assert not positions[:20].any()


# --- definitions ---


def test_contrastive_loss_equals_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(6, 5, generator=draw, dtype=torch.float64), dim=1) for _ in range(2))
    scale, smoothing = torch.tensor(7.0, dtype=torch.float64), 0.1
    expected = 0.0
    for scores in ((scale * images @ texts.T).tolist(), (scale * texts @ images.T).tolist()):
        for row, values in enumerate(scores):
            log_total = math.log(sum(math.exp(value) for value in values))
            for column, value in enumerate(values):
                target = (1 - smoothing) * (row == column) + smoothing / 6
                expected += target * (log_total - value) / 12
    assert contrastive_loss(images, texts, scale, smoothing).item() == pytest.approx(expected, abs=1e-12)


def test_weights_and_names_of_losses() -> None:
    draw = torch.Generator().manual_seed(0)
    images, captions, summaries = (normalize(torch.randn(20, 16, generator=draw), dim=1) for _ in range(3))
    scale = torch.tensor(10.0)
    losses = long_clip_losses(images, captions, summaries, scale, LossConfig(summary_loss_weight=0.3, pca_dim=4))
    assert losses.keys() == {"loss", "caption_loss", "summary_loss", "retained_variance", "pca_gap"}
    torch.testing.assert_close(losses["loss"], losses["caption_loss"] + 0.3 * losses["summary_loss"])
    # Not renormalised: the reconstruction goes into the logits as it is, as in the official code.
    logits = scale * primary_components(images, 4) @ summaries.T
    both = [cross_entropy(scores, torch.arange(20), label_smoothing=0.1) for scores in (logits, logits.T)]
    torch.testing.assert_close(losses["summary_loss"], sum(both) / 2)

    without = long_clip_losses(images, captions, None, scale, LossConfig())
    assert without.keys() == {"loss", "caption_loss"}
    torch.testing.assert_close(without["loss"], losses["caption_loss"])


def test_large_batches_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    features = [normalize(torch.randn(50, 6, generator=draw, dtype=torch.float64), dim=1) for _ in range(2)]
    scale = torch.tensor(7.0, dtype=torch.float64)

    def measured() -> tuple[list[Tensor], int]:
        leaves = [*(tensor.clone().requires_grad_() for tensor in features), scale.clone().requires_grad_()]
        largest = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = contrastive_loss(leaves[0], leaves[1], leaves[2], 0.1)
        return [loss, *torch.autograd.grad(loss, leaves)], largest

    whole, held = measured()
    monkeypatch.setattr("longclip.training.loss.MAX_LOGITS", 7 * 50)
    in_blocks, held_in_blocks = measured()
    torch.testing.assert_close(in_blocks, whole, rtol=1e-12, atol=1e-14)
    assert held == 50 * 50
    assert held_in_blocks <= 7 * 50


def test_learning_rate_schedule() -> None:
    factors = [learning_rate_factor(step, 4, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(12, 4, 20) == pytest.approx(0.5)
    assert learning_rate_factor(20, 4, 20) == pytest.approx(0.0)
    assert learning_rate_factor(0, 0, 1) == 1.0


# --- several workers ---

CHUNKS = (None, 2)


def _worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {}
    for chunk_size in CHUNKS:
        encoder = tiny_encoder()
        parallel = DistributedDataParallel(encoder)  # named, since it must outlive the backward pass
        losses = backward(parallel, share_of_batch(world_size, rank), LOSS, chunk_size)
        results[chunk_size] = losses, gradients(encoder)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_do_not_depend_on_workers_and_chunks(world_size: int, tmp_path: Path) -> None:
    run_workers(_worker, world_size, str(tmp_path), count=world_size)
    encoder = tiny_encoder()
    losses = backward(encoder, share_of_batch(1, 0), LOSS)
    expected = gradients(encoder)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for chunk_size in CHUNKS:
        for name, loss in losses.items():
            mean = sum(result[chunk_size][0][name] for result in results) / world_size
            torch.testing.assert_close(mean, loss, rtol=1e-10, atol=0)
        for result in results:
            assert_same_gradients(result[chunk_size][1], expected, 1e-10)
    assert all(gradient.any() for name, gradient in expected.items() if not name.endswith("k_proj.bias"))


# --- gradient caching ---


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_gradients_equal_plain_ones(chunk_size: int, dtype: torch.dtype, tolerance: float) -> None:
    plain, cached = tiny_encoder(dtype), tiny_encoder(dtype)
    losses = backward(plain, share_of_batch(1, 0), LOSS)
    torch.testing.assert_close(backward(cached, share_of_batch(1, 0), LOSS, chunk_size), losses, rtol=tolerance, atol=0)
    assert_same_gradients(gradients(cached), gradients(plain), tolerance)


def test_caching_keeps_only_the_activations_of_a_chunk() -> None:
    def held(chunk_size: int | None) -> int:
        return most_bytes_held(lambda: backward(tiny_encoder(), share_of_batch(1, 0), LOSS, chunk_size))

    assert held(2) < 0.2 * held(None)


def test_losses_without_summaries() -> None:
    batch = share_of_batch(1, 0)
    without = ImageTextBatch(batch.pixels, batch.caption, None)
    losses = backward(tiny_encoder(), without, LOSS, chunk_size=5)
    assert losses.keys() == {"loss", "caption_loss"}
    torch.testing.assert_close(losses["loss"], backward(tiny_encoder(), batch, LOSS)["caption_loss"])
