"""Statistics and bars of the histograms of the data report."""

import numpy as np
import pytest

from pipelines.data.histograms import LengthHistogram, ScoreHistogram


def test_length_statistics() -> None:
    histogram = LengthHistogram("x", {10: 60, 77: 10, 78: 14, 248: 10, 249: 6})
    assert histogram.summary() == {
        "texts": 100,
        "mean": pytest.approx((600 + 770 + 78 * 14 + 2480 + 249 * 6) / 100, abs=0.05),
        "median": 10,
        "max": 249,
        "share_over_77": 0.3,
        "share_over_248": 0.06,
    }
    assert histogram.description.startswith("30.0 % are longer than 77 tokens, 6.0 % are longer than 248 tokens.")
    assert sum(bar.count for bar in histogram.bars) == 100
    assert [bar.count for bar in histogram.bars if bar.label in ("72 to 79 tokens", "248 to 255 tokens")] == [24, 16]
    assert LengthHistogram("none", {}).summary()["median"] == 0


def test_longest_texts_share_the_last_bar() -> None:
    bars = LengthHistogram("x", {319: 1, 320: 2, 5000: 3}).bars
    assert [(bar.label, bar.count) for bar in bars[-2:]] == [("312 to 319 tokens", 1), ("320 or more tokens", 5)]
    assert bars[-1].height == 1


def test_score_statistics() -> None:
    scores = np.linspace(0.1, 0.5, 81, dtype=np.float32)
    histogram = ScoreHistogram("clip_score", scores, 0.2)
    assert histogram.summary() == pytest.approx(
        {"rows": 81, "mean": 0.3, "min": 0.1, "p10": 0.14, "median": 0.3, "p90": 0.46, "max": 0.5}, abs=1e-6
    )
    assert sum(bar.count for bar in histogram.bars) == 81
    assert [(mark.label, round(mark.place, 3)) for mark in histogram.marks] == [("0.200", 0.25)]
    assert histogram.ends == ("0.100", "0.500")


def test_equal_scores_and_a_low_threshold_have_no_mark() -> None:
    assert ScoreHistogram("clip_score", np.full(3, 0.25, np.float32), 0.25).marks == []
    assert ScoreHistogram("clip_score", np.array([0.25, 0.5], np.float32), 0.1).marks == []
