"""Histograms of the data report: lengths of texts, and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from longclip.constants import CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH

BIN_TOKENS, BINS = 8, 40
"""Bars of the histogram: 0 to 319 tokens, and one bar for longer texts."""

MARKS = (CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH)
"""Context lengths of CLIP and Long-CLIP."""


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram."""

    label: str
    """Range of values."""
    count: int
    height: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Mark:
    """A value of interest on the axis of a histogram."""

    label: str
    place: float
    """Between 0 (left) and 1 (right)."""


class Histogram(Protocol):
    """A distribution, as the report shows it."""

    kind: str
    """`tokens` or `scores`: what the manifest lists it under."""

    @property
    def title(self) -> str:
        """Name among the distributions of its kind."""

    @property
    def heading(self) -> str:
        """What is counted."""

    @property
    def count(self) -> int:
        """Number of values; a distribution without any is not shown."""

    @property
    def description(self) -> str:
        """The main figures in a sentence."""

    @property
    def bars(self) -> list[Bar]:
        """Bars from left to right."""

    @property
    def marks(self) -> Sequence[Mark]:
        """Marks on the axis."""

    @property
    def ends(self) -> tuple[str, str]:
        """Labels of the left and right end of the axis."""

    def summary(self) -> dict[str, float]:
        """Statistics for the manifest."""


@dataclass(frozen=True)
class LengthHistogram:
    """Distribution of text lengths."""

    title: str
    counts: Mapping[int, int]
    """CLIP tokens (start and end token included) -> number of texts of that length."""

    kind = "tokens"
    ends = ("0", f"{BIN_TOKENS * BINS}+")
    marks = tuple(Mark(str(tokens), tokens / BIN_TOKENS / (BINS + 1)) for tokens in MARKS)

    @property
    def heading(self) -> str:
        """What is counted."""
        return f"{self.title}: length in CLIP tokens"

    @property
    def count(self) -> int:
        """Number of texts."""
        return sum(self.counts.values())

    def share_over(self, tokens: int) -> float:
        """Share of texts that are longer."""
        return sum(count for length, count in self.counts.items() if length > tokens) / max(1, self.count)

    @property
    def mean(self) -> float:
        """Mean length."""
        return sum(length * count for length, count in self.counts.items()) / max(1, self.count)

    @property
    def median(self) -> int:
        """Median length."""
        texts_so_far = 0
        for length in sorted(self.counts):
            texts_so_far += self.counts[length]
            if 2 * texts_so_far >= self.count:
                return length
        return 0

    @property
    def description(self) -> str:
        """Share of texts that a context length cuts, and statistics."""
        cut = ", ".join(f"{100 * self.share_over(mark):.1f} % are longer than {mark} tokens" for mark in MARKS)
        longest = max(self.counts, default=0)
        return f"{cut}. {self.count:,} texts, mean {self.mean:.1f}, median {self.median}, longest {longest}."

    @property
    def bars(self) -> list[Bar]:
        """Bars of `BIN_TOKENS` tokens, and one for all longer texts."""
        totals = [0] * (BINS + 1)
        for length, count in self.counts.items():
            totals[min(length // BIN_TOKENS, BINS)] += count
        labels = [f"{place * BIN_TOKENS} to {place * BIN_TOKENS + BIN_TOKENS - 1} tokens" for place in range(BINS)]
        labels.append(f"{BINS * BIN_TOKENS} or more tokens")
        return _bars(labels, totals)

    def summary(self) -> dict[str, float]:
        """Statistics for the manifest."""
        figures: dict[str, float] = {"texts": self.count, "mean": round(self.mean, 1), "median": self.median}
        figures["max"] = max(self.counts, default=0)
        return figures | {f"share_over_{mark}": round(self.share_over(mark), 4) for mark in MARKS}


@dataclass(frozen=True)
class ScoreHistogram:
    """Distribution of scores."""

    title: str
    """Column of the scores."""
    scores: np.ndarray
    """`[n]` score of each row, n > 0."""
    threshold: float | None
    """Lowest score that is kept; None if all are."""

    kind = "scores"

    @property
    def heading(self) -> str:
        """What is counted."""
        return f"{self.title} of the rows"

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.scores)

    @property
    def description(self) -> str:
        """Statistics."""
        low, *middle, high = np.quantile(self.scores, (0, 0.1, 0.5, 0.9, 1))
        return (
            f"{self.count:,} rows, mean {self.scores.mean():.3f}, lowest {low:.3f}, 10 % below {middle[0]:.3f}, median"
            f" {middle[1]:.3f}, 10 % above {middle[2]:.3f}, highest {high:.3f}."
        )

    @property
    def bars(self) -> list[Bar]:
        """`BINS` bars of the same width from the lowest to the highest score."""
        counts, edges = np.histogram(self.scores, BINS)
        return _bars([f"{low:.3f} to {high:.3f}" for low, high in pairwise(edges)], counts.tolist())

    @property
    def marks(self) -> Sequence[Mark]:
        """The lowest score that is kept, if it is within the bars."""
        low, high = float(self.scores.min()), float(self.scores.max())
        if self.threshold is None or not low < self.threshold <= high:
            return []
        return [Mark(f"{self.threshold:.3f}", (self.threshold - low) / (high - low))]

    @property
    def ends(self) -> tuple[str, str]:
        """The lowest and the highest score."""
        return f"{self.scores.min():.3f}", f"{self.scores.max():.3f}"

    def summary(self) -> dict[str, float]:
        """Statistics for the manifest."""
        quantiles = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
        figures = {name: float(np.quantile(self.scores, share)) for name, share in quantiles.items()}
        return {"rows": self.count, "mean": float(self.scores.mean())} | figures


def _bars(labels: Sequence[str], counts: Sequence[int]) -> list[Bar]:
    highest = max(counts) or 1
    return [Bar(label, count, count / highest) for label, count in zip(labels, counts, strict=True)]
