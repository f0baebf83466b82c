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

from longclip.checkpoint import new_model
from longclip.convert import convert_checkpoint, stretch_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.loss import LossConfig, contrastive_loss, long_clip_losses
from longclip.pcm import primary_components
from longclip.state_dicts import to_huggingface
from longclip.stretch import freeze_kept_positions
from longclip.task import ImageTextBatch, LongClipTask, learning_rate_factor
from longclip.tokenizer import TokenBatch
from tests.conftest import tiny_config
from tests.test_pcm import run_workers

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


def test_contrastive_loss_by_its_definition() -> None:
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
    assert losses.keys() == {"loss", "caption_loss", "summary_loss"}
    torch.testing.assert_close(losses["loss"], losses["caption_loss"] + 0.3 * losses["summary_loss"])
    # Not renormalised: the reconstruction goes into the logits as it is, as in the official code.
    logits = scale * primary_components(images, 4) @ summaries.T
    both = [cross_entropy(scores, torch.arange(20), label_smoothing=0.1) for scores in (logits, logits.T)]
    torch.testing.assert_close(losses["summary_loss"], sum(both) / 2)

    without = long_clip_losses(images, captions, None, scale, LossConfig())
    assert without.keys() == {"loss", "caption_loss"}
    torch.testing.assert_close(without["loss"], losses["caption_loss"])


def test_learning_rate_schedule() -> None:
    factors = [learning_rate_factor(step, 4, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(12, 4, 20) == pytest.approx(0.5)
    assert learning_rate_factor(20, 4, 20) == pytest.approx(0.0)
    assert learning_rate_factor(0, 0, 1) == 1.0


# --- several workers ---

PAIRS = 12


def _task() -> LongClipTask:
    """A small task in float64: image towers take float32 pixels, so that the weights are converted after them."""
    torch.manual_seed(0)
    checkpoint = new_model(tiny_config(64))
    model = checkpoint.model.double()
    freeze_kept_positions(model)
    # Larger vision weights: features of an untrained tower are so alike that gradients would vanish.
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.mul_(3)
    return LongClipTask(_InDouble(model), checkpoint.transform, LossConfig(summary_loss_weight=0.7, pca_dim=4))


class _InDouble(torch.nn.Module):
    """The model with its pixels in float64, which the transform makes in float32."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def get_image_features(self, pixel_values: Tensor) -> object:
        return self.model.get_image_features(pixel_values=pixel_values.double())

    def get_text_features(self, input_ids: Tensor) -> object:
        return self.model.get_text_features(input_ids=input_ids)


def _tokens(draw: torch.Generator, longest: int) -> TokenBatch:
    lengths = torch.randint(3, longest + 1, (PAIRS,), generator=draw)
    ids = torch.randint(1, 49406, (PAIRS, longest), generator=draw)
    column = torch.arange(longest)
    ids[column >= lengths[:, None]] = 0
    ids[torch.arange(PAIRS), lengths - 1] = 49407
    return TokenBatch(ids, lengths, lengths)


def _share(world_size: int, rank: int) -> ImageTextBatch:
    """Part of one and the same batch."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (PAIRS, 32, 32, 3), dtype=torch.uint8, generator=draw)
    rows = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    caption, summary = (
        TokenBatch(tokens.input_ids[rows], tokens.lengths[rows], tokens.full_lengths[rows])
        for tokens in (_tokens(draw, 60), _tokens(draw, 12))
    )
    return ImageTextBatch(pixels[rows], caption, summary)


def _gradients(task: LongClipTask) -> dict[str, Tensor]:
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def _worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    task = _task()
    parallel = DistributedDataParallel(task)  # named, since it must outlive the backward pass to average gradients
    losses = parallel(_share(world_size, rank))
    losses["loss"].backward()
    torch.save(({name: loss.detach() for name, loss in losses.items()}, _gradients(task)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_like_one(tmp_path: Path) -> None:
    run_workers(_worker, 2, str(tmp_path), count=2)
    task = _task()
    losses = task(_share(1, 0))
    losses["loss"].backward()
    expected = _gradients(task)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, loss in losses.items():
        mean = (results[0][0][name] + results[1][0][name]) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=0, atol=1e-6)
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            difference = (gradient - expected[name]).norm()
            assert difference <= 1e-6 * expected[name].norm() + 1e-12, name
    assert all(gradient.any() for name, gradient in expected.items() if not name.endswith("k_proj.bias"))
