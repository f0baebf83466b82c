"""The data report: an HTML file with counts, text lengths in CLIP tokens, reasons for rejection, and samples."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from longclip.constants import CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH
from pipelines.common.pages import TEMPLATES
from pipelines.common.rejected_rows import SAMPLES_PER_REASON, without_values
from pipelines.common.thumbnails import thumbnail

BIN_TOKENS, BINS = 8, 40
"""Bars of the histogram: 0 to 319 tokens, and one bar for longer texts."""

MARKS = (CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH)
"""Context lengths of CLIP and Long-CLIP."""

MAX_REASONS = 50


@dataclass(frozen=True)
class Histogram:
    """Distribution of text lengths."""

    title: str
    counts: Mapping[int, int]
    """CLIP tokens (start and end token included) -> number of texts of that length."""

    @property
    def texts(self) -> int:
        """Number of texts."""
        return sum(self.counts.values())

    def share_over(self, tokens: int) -> float:
        """Share of texts that are longer."""
        return sum(count for length, count in self.counts.items() if length > tokens) / max(1, self.texts)

    @property
    def mean(self) -> float:
        """Mean length."""
        return sum(length * count for length, count in self.counts.items()) / max(1, self.texts)

    @property
    def median(self) -> int:
        """Median length."""
        texts_so_far = 0
        for length in sorted(self.counts):
            texts_so_far += self.counts[length]
            if 2 * texts_so_far >= self.texts:
                return length
        return 0

    @property
    def bars(self) -> list[dict[str, Any]]:
        """Bars of the chart: range of tokens, number of texts, height between 0 and 1."""
        totals = [0] * (BINS + 1)
        for length, count in self.counts.items():
            totals[min(length // BIN_TOKENS, BINS)] += count
        labels = [f"{place * BIN_TOKENS} to {place * BIN_TOKENS + BIN_TOKENS - 1}" for place in range(BINS)]
        labels.append(f"{BINS * BIN_TOKENS} or more")
        highest = max(totals) or 1
        return [
            {"label": label, "texts": total, "height": total / highest}
            for label, total in zip(labels, totals, strict=True)
        ]

    def summary(self) -> dict[str, float]:
        """Statistics for the manifest."""
        figures: dict[str, float] = {"texts": self.texts, "mean": round(self.mean, 1), "median": self.median}
        figures["max"] = max(self.counts, default=0)
        return figures | {f"share_over_{mark}": round(self.share_over(mark), 4) for mark in MARKS}


@dataclass(frozen=True)
class Sample:
    """A row shown in the report."""

    id: str
    image: bytes | None
    """Encoded image; None if the data set has no images."""
    caption: str
    summaries: Mapping[str, str]
    """Strategy -> summary."""
    tokens: int
    """CLIP tokens of the caption."""

    @property
    def thumbnail(self) -> str | None:
        """The image as a small data URI; None if there is none or it cannot be decoded."""
        return _data_uri(thumbnail(self.image or b""))


@dataclass(frozen=True)
class RejectedSample:
    """A rejected row shown in the report."""

    id: str
    reason: str
    caption: str
    thumbnail: str | None
    """The image as a small data URI; None if it cannot be decoded."""


class RejectedSamples:
    """Chooses some rejected rows, of as many reasons as possible."""

    def __init__(self) -> None:
        self.chosen: list[RejectedSample] = []
        self._counts: Counter[str] = Counter()

    def add(self, rows: pa.Table) -> None:
        """Consider rows of `pipelines.common.rejected_rows.SAMPLE_SCHEMA`."""
        for row in rows.filter(pc.field("caption").is_valid()).to_pylist():
            group = without_values(row["reason"])
            self._counts[group] += 1
            if self._counts[group] <= SAMPLES_PER_REASON and len(self.chosen) < MAX_REASONS:
                uri = _data_uri(row["thumbnail"])
                self.chosen.append(RejectedSample(row["id"], row["reason"], row["caption"], uri))


def _data_uri(jpeg: bytes | None) -> str | None:
    return None if jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def render_report(
    title: str,
    facts: Sequence[tuple[str, str]],
    rejected: Sequence[tuple[str, str, int]],
    histograms: Sequence[Histogram],
    samples: Sequence[Sample],
    settings: Mapping[str, Any],
    rejected_samples: Sequence[RejectedSample] = (),
) -> str:
    """Render the report as one HTML file. All texts are escaped, because they come from the data.

    Args:
        title: heading.
        facts: names and values.
        rejected: (stage, reason, number of rows).
        histograms: distributions of text lengths.
        samples: rows to show.
        settings: settings of the job.
        rejected_samples: rejected rows to show.
    """
    return TEMPLATES.get_template("data/report.html").render(
        title=title,
        facts=facts,
        rejected=sorted(rejected, key=lambda line: -line[2])[:MAX_REASONS],
        more_reasons=max(0, len(rejected) - MAX_REASONS),
        histograms=[histogram for histogram in histograms if histogram.texts],
        marks=[(mark, mark / BIN_TOKENS / (BINS + 1)) for mark in MARKS],
        samples=samples,
        rejected_samples=rejected_samples,
        settings=yaml.safe_dump(dict(settings), sort_keys=False),
    )
