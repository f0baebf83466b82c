"""From rows to what a model eats, and which of several texts of a row a pass draws."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import ray
import torch

from longclip.images import ImageTransform
from longclip.tokenizer import load_tokenizer
from pipelines.common.columns import Columns
from pipelines.common.model_inputs import ModelInputs
from pipelines.training.loop import draw_texts
from tests.support.pictures import picture
from tests.support.rows import Refused


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Refused()


def cells(*texts: Any) -> np.ndarray:
    column = np.empty(len(texts), dtype=object)
    column[:] = texts
    return column


def batch(captions: np.ndarray) -> dict[str, np.ndarray]:
    count = len(captions)
    return {
        "id": cells(*(f"row-{row}" for row in range(count))),
        "image": cells(*(picture(row) for row in range(count))),
        "caption": captions,
    }


def inputs_of(captions: np.ndarray, most: int, refused: Refused) -> dict[str, np.ndarray]:
    return ModelInputs(Columns(), {"caption": most}, ImageTransform(32), None, 248, refused)(batch(captions))


def texts_of(ids: np.ndarray, lengths: np.ndarray) -> list[str]:
    tokenizer = load_tokenizer(None, 248)
    return [tokenizer.decode(row[1 : length - 1]).strip() for row, length in zip(ids, lengths, strict=True)]


def test_a_text_is_one_candidate(refused: Refused) -> None:
    rows = inputs_of(cells("a red dog", "two cats"), 1, refused)
    assert rows["caption_ids"].shape == (2, 1, 248)
    assert texts_of(rows["caption_ids"][:, 0], rows["caption_lengths"][:, 0]) == ["a red dog", "two cats"]
    assert rows["caption_count"].tolist() == [1, 1]
    assert rows["pixels"].shape == (2, 32, 32, 3)


def test_lists_of_any_length_give_the_same_shape(refused: Refused) -> None:
    captions = cells(
        ["one"], np.array(["one", "two"], dtype=object), ["one", "", None, "two", "three", "four"], [" "], None
    )
    rows = inputs_of(captions, 3, refused)
    assert rows["caption_ids"].shape == (3, 3, 248)
    assert rows["caption_count"].tolist() == [1, 2, 3]
    assert texts_of(rows["caption_ids"][2], rows["caption_lengths"][2]) == ["one", "two", "three"]
    assert refused.reasons == {"row-3": "column 'caption' has no text", "row-4": "column 'caption' has no text"}


def test_a_pass_draws_among_the_texts_of_each_row_by_its_id(refused: Refused) -> None:
    rows = 400
    made = inputs_of(cells(*(["one", "two", "three"][: 1 + row % 3] for row in range(rows))), 3, refused)
    tensors = {name: torch.from_numpy(values) for name, values in made.items()}

    def drawn(seed: int) -> list[str]:
        tokens = draw_texts(tensors, "caption", seed)
        return texts_of(tokens.input_ids.numpy(), tokens.lengths.numpy())

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    assert all(text in ["one", "two", "three"][: 1 + row % 3] for row, text in enumerate(first))
    counts = Counter(text for seed in range(20) for text in drawn(seed)[2::3])
    assert min(counts.values()) / sum(counts.values()) > 0.28  # a third each; 2660 draws
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    shuffled = draw_texts({name: values[order] for name, values in tensors.items()}, "caption", 0)
    assert texts_of(shuffled.input_ids.numpy(), shuffled.lengths.numpy()) == [first[row] for row in order.tolist()]
