"""Scores of questions on numbers: HiMo from prefixes of captions, and retrieval with several right answers."""

import json

import numpy as np
import pytest
from eccv_caption._metrics import compute_eccv_metrics

from pipelines.evaluation.questions.eccv_caption import matches_directory
from pipelines.evaluation.questions.matches import precisions
from pipelines.evaluation.questions.monotonicity import growth_scores, prefix
from pipelines.evaluation.tasks import protocols


def test_prefixes_of_captions() -> None:
    caption = "One is red. Two is blue. Three is green. Four is pink. Five is black."
    assert prefix("first_half", caption) == "One is red. Two is blue."
    assert prefix("first_third", caption) == "One is red."
    assert prefix("first_two_thirds", caption) == "One is red. Two is blue. Three is green."
    assert prefix("first_third", "One is red. Two is blue.") == "One is red. Two is blue."  # too few sentences


def test_growth_of_similarity() -> None:
    similarities = {
        "first_half": [0.1, 0.3, 0.2, 0.2],
        "first_third": [0.1, 0.1, 0.1, 0.1],
        "first_two_thirds": [0.2, 0.1, 0.4, 0.2],
        "whole": [0.3, 0.2, 0.3, 0.2],
    }
    applies = {name: np.array([True, True, True, False]) for name in similarities}
    scores = growth_scores(
        {name: np.array(values) for name, values in similarities.items()},
        applies,
        ["a#0", "b#0", "c#0", "d#0"],
        np.arange(4),
    )
    assert {name: (score.values.tolist(), score.queries) for name, score in scores.items()} == {
        "himo@2": ([1, 0, 1], ("a#0", "b#0", "c#0")),
        "himo@3": ([1, 0, 0], ("a#0", "b#0", "c#0")),
    }


def test_precisions_equal_a_plain_count() -> None:
    random = np.random.default_rng(0)
    queries, candidates = (random.normal(size=(count, 8)).astype(np.float32) for count in (300, 40))
    candidates[7] = candidates[3]  # they tie: the wrong one of them is in front
    ids = [str(number) for number in range(40)]
    right = [set(random.choice([*ids, "missing"], size=random.integers(1, 9), replace=False)) for _ in queries]
    for query, matches, found in zip(queries, right, precisions(queries, candidates, ids, right), strict=True):
        scores = candidates.astype(np.float64) @ query
        ranked = sorted(range(40), key=lambda n: (-round(scores[n], 9), ids[n] in matches))[: len(matches)]
        hits = [ids[n] in matches for n in ranked]
        expected = [sum(hits[: n + 1]) / (n + 1) if hit else 0 for n, hit in enumerate(hits)]
        assert found == pytest.approx([float(hits[0]), sum(hits) / len(matches), sum(expected) / len(matches)])


def test_precisions_equal_those_of_the_package() -> None:
    random = np.random.default_rng(1)
    queries, candidates = (random.normal(size=(count, 8)).astype(np.float32) for count in (50, 200))
    right = {n: set(random.choice(range(220), size=random.integers(1, 20), replace=False).tolist()) for n in range(50)}
    ranked = {n: np.argsort(-candidates @ query).tolist() for n, query in enumerate(queries)}
    expected = compute_eccv_metrics(ranked, right)
    matches = [set(map(str, right[n])) for n in range(50)]
    found = precisions(queries, candidates, list(map(str, range(200))), matches).mean(axis=0)
    assert found == pytest.approx([expected[f"eccv_{name}"] for name in ("r1", "rprecision", "map_at_r")])


def test_the_package_has_the_matches_that_the_protocol_expects() -> None:
    def content(name: str) -> dict[str, list[int]]:
        return json.loads((matches_directory() / f"{name}.json").read_text())

    protocol, images = protocols()["eccv-caption"], content("original_image_to_caption")
    assert (len(images), sum(map(len, images.values()))) == (protocol.expected_images, protocol.expected_texts)
    captions = {str(caption) for image in images.values() for caption in image}
    to_text, to_image = content("eccv_image_to_caption"), content("eccv_caption_to_image")
    assert to_text.keys() <= images.keys()
    assert to_image.keys() <= captions
    assert list(protocol.expected_questions.values()) == [len(to_text), len(to_image)]
