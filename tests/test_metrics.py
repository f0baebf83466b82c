"""Retrieval metrics against brute force."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longclip import metrics
from longclip.metrics import retrieval_ranks, retrieval_recall


def brute_force_ranks(images: Tensor, texts: Tensor, image_of_text: list[int]) -> dict[str, list[int]]:
    """Ranks by loops in float64; the answer comes behind every wrong candidate of the same score."""
    scores = (images.double() @ texts.double().T).tolist()
    count = range(len(scores))
    text_to_image = [
        sum(scores[image][text] >= scores[own][text] for image in count if image != own)
        for text, own in enumerate(image_of_text)
    ]
    image_to_text = []
    for image in count:
        best = max(scores[image][text] for text, own in enumerate(image_of_text) if own == image)
        wrong = [text for text, own in enumerate(image_of_text) if own != image]
        image_to_text.append(sum(scores[image][text] >= best for text in wrong))
    return {"text_to_image": text_to_image, "image_to_text": image_to_text}


def random_case(seed: int, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images, extra = 13, 1 + seed % 20
    image_of_text = torch.cat([torch.randperm(images, generator=draw), torch.randint(images, (extra,), generator=draw)])
    if ties:  # small integers: products are exact, and many are equal
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
    expected = brute_force_ranks(images, texts, image_of_text.tolist())
    for chunk in (1024, 4):
        monkeypatch.setattr(metrics, "_CHUNK", chunk)
        ranks = retrieval_ranks(images, texts, image_of_text)
        assert {direction: found.tolist() for direction, found in ranks.items()} == expected
    recall = retrieval_recall(images, texts, image_of_text, (1, 3))
    assert recall == {
        f"{direction}/recall@{k}": pytest.approx(sum(rank < k for rank in found) / len(found))
        for direction, found in expected.items()
        for k in (1, 3)
    }


def test_perfect_and_constant_features() -> None:
    perfect = retrieval_recall(torch.eye(12), torch.eye(12), torch.arange(12))
    assert len(perfect) == 6
    assert set(perfect.values()) == {1.0}
    # A collapsed model scores everything equally: it must not look perfect.
    collapsed = retrieval_recall(torch.ones(12, 4), torch.ones(12, 4), torch.arange(12))
    assert set(collapsed.values()) == {0.0}


def test_other_captions_of_the_same_image_do_not_compete() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.9, 0.0], [0.6, 0.7]])
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 0, 1]))
    assert ranks["image_to_text"].tolist() == [0, 0]
    assert ranks["text_to_image"].tolist() == [0, 0, 0, 0]
