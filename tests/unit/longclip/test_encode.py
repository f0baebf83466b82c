"""Encoding without padding: the same features for far fewer tokens."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from longclip.checkpoint import Checkpoint
from longclip.encode import encode_image, encode_text, text_micro_batches, unit
from longclip.tokenizer import TokenBatch, tokenize


class Calls:
    """What reached the text model."""

    def __init__(self) -> None:
        self.tokens = 0
        self.shapes: list[tuple[int, ...]] = []
        self.masks: list[Any] = []


@pytest.fixture
def calls(tiny_checkpoint: Checkpoint) -> Iterator[Calls]:
    seen = Calls()

    def note(module: object, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        seen.tokens += ids.numel()
        seen.shapes.append(tuple(ids.shape))

    def note_mask(module: object, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.masks.append(args[1])
        assert kwargs == {"is_causal": True}

    tower = tiny_checkpoint.model.text_model
    hooks = [
        tower.embeddings.register_forward_pre_hook(note, with_kwargs=True),
        tower.encoder.layers[0].register_forward_pre_hook(note_mask, with_kwargs=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def tokens(tiny_checkpoint: Checkpoint) -> TokenBatch:
    """50 texts of very different lengths in no order; some have the same length."""
    lengths = [*torch.randint(1, 60, (47,), generator=torch.Generator().manual_seed(1)).tolist(), 300, 246, 1]
    words = ("red", "dog", "house", "walks", "under", "seven")
    texts = [" ".join(words[(n + i) % 6] for i in range(length)) for n, length in enumerate(lengths)]
    return tokenize(tiny_checkpoint.tokenizer, texts)


def fully_padded(checkpoint: Checkpoint, tokens: TokenBatch) -> Tensor:
    ids = torch.zeros(len(tokens), 248, dtype=torch.int64)
    ids[:, : tokens.input_ids.shape[1]] = tokens.input_ids
    return checkpoint.model.get_text_features(input_ids=ids).pooler_output


@torch.no_grad()
@pytest.mark.parametrize("micro_batch_size", [1, 7, 32, 1000])
def test_equals_full_padding_in_the_same_order(
    tiny_checkpoint: Checkpoint, tokens: TokenBatch, micro_batch_size: int
) -> None:
    features = unit(encode_text(tiny_checkpoint.model, tokens, micro_batch_size))
    expected = unit(fully_padded(tiny_checkpoint, tokens))
    assert expected.std(0).min() > 1e-3  # texts differ, so a wrong order would show
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_gradient_equals_that_of_full_padding(tiny_checkpoint: Checkpoint, tokens: TokenBatch) -> None:
    weight = tiny_checkpoint.model.text_projection.weight
    direction = torch.randn(len(tokens), 24, generator=torch.Generator().manual_seed(2))
    (actual,) = torch.autograd.grad((encode_text(tiny_checkpoint.model, tokens, 8) * direction).sum(), weight)
    (expected,) = torch.autograd.grad((fully_padded(tiny_checkpoint, tokens) * direction).sum(), weight)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_model_gets_few_tokens_and_no_mask(tiny_checkpoint: Checkpoint, tokens: TokenBatch, calls: Calls) -> None:
    encode_text(tiny_checkpoint.model, tokens, micro_batch_size=8)
    assert calls.tokens < 0.25 * len(tokens) * 248
    assert calls.tokens < 1.4 * int(tokens.lengths.sum())
    assert [shape[0] for shape in calls.shapes] == [8] * 6 + [2]
    widths = [shape[1] for shape in calls.shapes]
    assert widths == sorted(widths)
    assert widths[-1] == 248
    assert calls.masks == [None] * 7


def test_image_features_and_their_gradients(tiny_checkpoint: Checkpoint) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    model = deepcopy(tiny_checkpoint.model).double()
    weights = list(model.vision_model.parameters())
    features = encode_image(model, pixels)
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert features.shape == (3, 24)
    torch.testing.assert_close(features, expected)
    for actual, true in zip(
        torch.autograd.grad(features.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(actual, true, rtol=1e-9, atol=1e-12)


def test_last_layer_computes_only_the_tokens_that_are_read(tiny_checkpoint: Checkpoint, tokens: TokenBatch) -> None:
    model = tiny_checkpoint.model
    rows: list[int] = []
    hooks = [
        tower.encoder.layers[-1].mlp.fc1.register_forward_pre_hook(
            lambda _, args: rows.append(args[0].shape[:-1].numel())
        )
        for tower in (model.text_model, model.vision_model)
    ]
    encode_text(model, tokens, 8)
    encode_image(model, torch.randn(8, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert rows == [8] * 6 + [2] + [8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unit_length_in_float32_or_better(dtype: torch.dtype) -> None:
    scaled = unit(torch.randn(4, 8).to(dtype) * 100)
    assert scaled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scaled.norm(dim=1), torch.ones(4, dtype=scaled.dtype))


# --- counted work, on models of published sizes that hold no numbers ---


def sharegpt4v_like(rows: int) -> TokenBatch:
    """Captions and summaries of one batch, with the lengths of ShareGPT4V's: 180 +- 38 and about 21 tokens."""
    draw = torch.Generator().manual_seed(0)
    captions = (torch.randn(rows, generator=draw) * 38 + 180).round().long().clamp(40, 248)
    summaries = (torch.randn(rows, 6, generator=draw).square().sum(1) * 3.2 + 2).round().long().clamp(4, 248)
    lengths = torch.cat([captions, summaries])
    return TokenBatch(torch.ones(2 * rows, int(lengths.max()), dtype=torch.int64), lengths, lengths)


def test_nearly_all_computed_tokens_are_real() -> None:
    tokens = sharegpt4v_like(256)
    computed = sum(len(rows) * int(tokens.lengths[rows].max()) for rows in text_micro_batches(tokens))
    assert int(tokens.lengths.sum()) / computed >= 0.93


@pytest.mark.parametrize(
    ("patch", "width", "layers", "text_width", "least"),
    [(32, 768, 12, 512, 2.0), (16, 768, 12, 512, 1.5), (14, 1024, 24, 768, 1.28)],
    ids=["B/32", "B/16", "L/14"],
)
def test_operations_against_padding_to_248(patch: int, width: int, layers: int, text_width: int, least: float) -> None:
    tower = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": text_width // 64}
    config = CLIPConfig(
        text_config={**tower, "max_position_embeddings": 248, "eos_token_id": 49407},
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "patch_size": patch,
        },
        projection_dim=text_width,
    )
    rows = 256
    with torch.device("meta"):
        model = CLIPModel(config)
        pixel_values = torch.empty(rows, 3, 224, 224)
        padded = torch.ones(2 * rows, 248, dtype=torch.int64)
    with FlopCounterMode(display=False) as padding:
        model.get_image_features(pixel_values=pixel_values)
        model.get_text_features(input_ids=padded)
    with FlopCounterMode(display=False) as ours:
        encode_image(model, pixel_values)
        encode_text(model, sharegpt4v_like(rows))
    assert padding.get_total_flops() / ours.get_total_flops() >= least
