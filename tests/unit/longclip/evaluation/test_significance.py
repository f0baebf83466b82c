"""Intervals that hold what they promise, and a paired test that agrees with exact ones."""

from math import comb

import numpy as np
import pytest

from longclip.evaluation import significance
from longclip.evaluation.significance import compare_paired, mean_interval, relative_change_interval


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p: all divisions of the queries on which the models differ are equally likely."""
    total = better + worse
    tail = sum(comb(total, count) for count in range(min(better, worse) + 1)) / 2**total
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("better", "worse"), [(12, 3), (30, 24), (5, 5), (9, 0), (0, 0)])
def test_single_queries_equal_mcnemars_test(better: int, worse: int) -> None:
    a = np.array([0] * better + [1] * worse + [1] * 40 + [0] * 40)
    b = np.array([1] * better + [0] * worse + [1] * 40 + [0] * 40)
    found = compare_paired(a, b, resamples=20000)
    assert found.p_value == pytest.approx(mcnemar(better, worse), abs=0.01)
    assert (found.better, found.worse, found.queries) == (better, worse, len(a))
    assert found.difference == pytest.approx((better - worse) / len(a))
    assert found.low <= found.difference <= found.high


def test_copies_of_a_query_add_no_evidence() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, 40), draw.integers(0, 2, 40)
    alone = compare_paired(a, b)
    copies = compare_paired(np.repeat(a, 5), np.repeat(b, 5), np.repeat(np.arange(40), 5))
    assert (copies.p_value, copies.low, copies.high) == pytest.approx((alone.p_value, alone.low, alone.high))
    naive = compare_paired(np.repeat(a, 5), np.repeat(b, 5))
    assert naive.high - naive.low < 0.6 * (copies.high - copies.low)
    wide, narrow = mean_interval(np.repeat(a, 5), np.repeat(np.arange(40), 5)), mean_interval(np.repeat(a, 5))
    assert narrow[1] - narrow[0] < 0.6 * (wide[1] - wide[0])


def test_intervals_have_their_nominal_coverage() -> None:
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = mean_interval(draw.random(200) < 0.7, level=0.9, resamples=500)
        held += low <= 0.7 <= high
    assert 165 <= held <= 195  # 180 expected, standard deviation 4.2


def test_chunked_resampling_equals_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    a, b = draw.random(300), draw.random(300) + 0.02
    whole = compare_paired(a, b)
    assert whole == compare_paired(a, b), "the same measurements give the same interval"
    monkeypatch.setattr(significance, "_DRAWS_AT_ONCE", 1000)
    assert compare_paired(a, b).asdict() == pytest.approx(whole.asdict())


def test_groups_may_be_uneven() -> None:
    values, groups = np.array([1, 1, 1, 0, 0, 1.0]), np.array([7, 7, 7, 2, 2, 9])
    low, high = mean_interval(values, groups)
    assert 0 <= low < 4 / 6 < high <= 1
    # The mean is that of the queries, not of the groups' means.
    values, groups = np.repeat([1.0, 0.0], [900, 100]), np.concatenate([np.arange(900) // 9, np.arange(100, 200)])
    low, high = mean_interval(values, groups)
    assert low < 0.9 < high
    assert low > 0.8
    with pytest.raises(ValueError, match="not pairs"):
        compare_paired(values, values[:3])


@pytest.mark.parametrize("queries", [24, 40, 1000])
def test_no_observed_difference_does_not_prove_equality(queries: int) -> None:
    # The bounds of Wilson's interval, and the rule of three: what never happened in n may happen in 3 of n.
    z2 = 1.96**2
    low, high = mean_interval(np.ones(queries))
    assert high == 1
    assert 1 - low == pytest.approx(z2 / (queries + z2), rel=0.3)
    same = compare_paired(np.ones(queries), np.ones(queries))
    assert -same.low == pytest.approx(3 / (queries + 2))
    assert same.low == pytest.approx(-same.high, abs=1 / queries)
    assert same.p_value == 1


def test_relative_change_of_one_draw_agrees_with_the_delta_method() -> None:
    draw = np.random.default_rng(3)
    whole = (draw.random(1000) < 0.8).astype(float)
    changed = whole * (draw.random(1000) < 0.7)
    ratio = changed.mean() / whole.mean()
    error = (changed - ratio * whole).std() / whole.mean() / np.sqrt(1000)
    low, high = relative_change_interval(whole, changed[None]) or (0, 0)
    assert (low, high) == pytest.approx((ratio - 1 - 1.96 * error, ratio - 1 + 1.96 * error), abs=0.004)


def test_relative_change_covers_queries_and_draws() -> None:
    # A draw that is 0.1 better or worse for all queries, as with a gallery of changed texts.
    draw = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        whole = (draw.random(300) < 0.8).astype(float)
        chances = 0.7 + draw.choice([-0.1, 0.1], (5, 1))
        found = relative_change_interval(whole, whole * (draw.random((5, 300)) < chances), level=0.9, resamples=300)
        held += found is not None and found[0] <= -0.3 <= found[1]
    assert 150 <= held <= 195
    shared = relative_change_interval(np.ones(300), np.array([[0.6], [0.8]]) * np.ones((2, 300))) or (0, 0)
    assert shared[1] - shared[0] > 0.15, "draws that differ alone give a width"


def test_relative_change_is_clustered_and_needs_hits() -> None:
    draw = np.random.default_rng(5)
    whole, changed = (draw.random(100) < 0.8).astype(float), (draw.random((5, 100)) < 0.5).astype(float)
    alone = relative_change_interval(whole, changed)
    groups = np.repeat(np.arange(100), 5)
    copies = relative_change_interval(np.repeat(whole, 5), np.repeat(changed, 5, axis=1), groups)
    assert copies == pytest.approx(alone)
    for hits, is_there in ((0, False), (2, False), (20, True)):
        few = (np.arange(100) < hits).astype(float)
        assert (relative_change_interval(few, few[None]) is not None) is is_there
    same = relative_change_interval(np.ones(100), np.ones((1, 100)))
    assert same is not None
    assert same[0] < -0.01, "no observed loss does not prove that there is none"
