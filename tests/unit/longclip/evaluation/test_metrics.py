"""Ranking metrics against brute force."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longclip.errors import DataError
from longclip.evaluation import metrics
from longclip.evaluation.metrics import Ranks, classification_ranks, retrieval_figures, retrieval_ranks

Answers = list[tuple[int, int, float]]
"""(rank, ties, average precision) of each query."""


def brute_force(scores: list[list[float]], right: list[set[int]]) -> Answers:
    """Every query's candidates sorted in float64, wrong ones in front of right ones of the same score."""
    answers = []
    for row, own in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda candidate: (-row[candidate], candidate in own))
        places = [place for place, candidate in enumerate(order) if candidate in own]
        best = max(row[candidate] for candidate in own)
        ties = sum(row[candidate] == best for candidate in range(len(row)) if candidate not in own)
        precision = [(found + 1) / (place + 1) for found, place in enumerate(places)]
        answers.append((places[0], ties, sum(precision) / len(precision)))
    return answers


def brute_force_retrieval(images: Tensor, texts: Tensor, image_of_text: list[int]) -> dict[str, Answers]:
    scores = images.double() @ texts.double().T
    owned = [{text for text, own in enumerate(image_of_text) if own == image} for image in range(len(images))]
    return {
        "text_to_image": brute_force(scores.T.tolist(), [{image} for image in image_of_text]),
        "image_to_text": brute_force(scores.tolist(), owned),
    }


def answers_of(ranks: Ranks) -> Answers:
    columns = (ranks.rank.tolist(), ranks.ties.tolist(), ranks.average_precision.tolist())
    return list(zip(*columns, strict=True))


def random_case(seed: int, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images, extra = 13, 1 + 3 * (seed % 20)
    image_of_text = torch.cat([torch.randperm(images, generator=draw), torch.randint(images, (extra,), generator=draw)])
    if ties:  # small integers: products are exact, many are equal, and so are many whole rows
        return (
            torch.randint(-1, 2, (images, 4), generator=draw).float(),
            torch.randint(-1, 2, (images + extra, 4), generator=draw).float(),
            image_of_text,
        )
    features = torch.randn(images, 6, generator=draw)
    noisy = features[image_of_text] + torch.randn(images + extra, 6, generator=draw)
    return normalize(features, dim=1), normalize(noisy, dim=1), image_of_text


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_equals_brute_force(seed: int, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, image_of_text = random_case(seed, ties)
    expected = brute_force_retrieval(images, texts, image_of_text.tolist())
    for block in (1 << 24, 100, 1):
        monkeypatch.setattr(metrics, "BLOCK_SCORES", block)
        ranks = retrieval_ranks(images, texts, image_of_text)
        for direction, answers in expected.items():
            np.testing.assert_allclose(answers_of(ranks[direction]), answers)
    figures = retrieval_figures(ranks, (1, 3))
    for direction, answers in expected.items():
        places = sorted(place for place, _, _ in answers)
        middle = (places[(len(places) - 1) // 2] + places[len(places) // 2]) / 2
        assert {name: value for name, value in figures.items() if name.startswith(direction)} == {
            f"{direction}/recall@1": pytest.approx(sum(place < 1 for place in places) / len(places)),
            f"{direction}/recall@3": pytest.approx(sum(place < 3 for place in places) / len(places)),
            f"{direction}/median_rank": middle + 1,
            f"{direction}/map": pytest.approx(sum(precision for _, _, precision in answers) / len(answers)),
            f"{direction}/candidates": len(images) if direction == "text_to_image" else len(texts),
            f"{direction}/tied_queries": sum(tied > 0 for _, tied, _ in answers),
        }


def test_perfect_and_constant_features() -> None:
    perfect = retrieval_figures(retrieval_ranks(torch.eye(12), torch.eye(12), torch.arange(12)))
    assert all(perfect[f"{way}/recall@1"] == 1 for way in ("image_to_text", "text_to_image"))
    # A collapsed model scores everything equally: it must not look perfect.
    collapsed = retrieval_ranks(torch.ones(12, 4), torch.ones(12, 4), torch.arange(12))
    for found in collapsed.values():
        assert (found.recall(10), found.figures()["tied_queries"]) == (0, 12)


def test_equal_candidates_tie_in_spite_of_rounding() -> None:
    # A matrix product may add up the columns of its edge in another order than those inside.
    draw = torch.Generator().manual_seed(0)
    for count in range(2, 40):
        images = normalize(torch.randn(count, 517, generator=draw), dim=1)
        images[-1] = images[0]
        ranks = retrieval_ranks(images, images + 0.01, torch.arange(count))["text_to_image"]
        assert ranks.rank[[0, -1]].tolist() == [1, 1]
        assert ranks.ties[[0, -1]].tolist() == [1, 1]


def test_other_captions_of_the_same_image_do_not_compete() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.9, 0.0], [0.6, 0.7]])
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 0, 1]))
    assert ranks["image_to_text"].rank.tolist() == [0, 0]
    assert ranks["image_to_text"].average_precision.tolist() == pytest.approx([(1 + 1 + 3 / 4) / 3, 1])
    assert ranks["text_to_image"].rank.tolist() == [0, 0, 0, 0]


def test_a_broken_model_and_a_missing_text_are_refused() -> None:
    images = torch.eye(3)
    broken = images.clone()
    broken[1, 0] = math.nan
    with pytest.raises(DataError, match="1 of 3 text embeddings are not finite"):
        retrieval_ranks(images, broken, torch.arange(3))
    with pytest.raises(DataError, match="1 of 3 image embeddings are not finite"):
        classification_ranks(broken, images, torch.arange(3))
    with pytest.raises(DataError, match="image 2 of 3 has no text"):
        retrieval_ranks(images, images[:2], torch.arange(2))


def test_classification_equals_brute_force() -> None:
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(-1, 2, (50, 4), generator=draw).float()
    classes = torch.randint(-1, 2, (7, 4), generator=draw).float()
    labels = torch.randint(7, (50,), generator=draw)
    expected = brute_force((images @ classes.T).tolist(), [{label} for label in labels.tolist()])
    found = classification_ranks(images, classes, labels)
    np.testing.assert_allclose(answers_of(found), expected)
    assert found.candidates == 7
