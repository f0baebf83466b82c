"""The data report: an HTML file with counts, text lengths in CLIP tokens, reasons for rejection, and samples."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from longclip.constants import CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import ImageError
from longclip.images import decode_image
from pipelines.common.pages import TEMPLATES

BIN_TOKENS, BINS = 8, 40
"""Bars of the histogram: 0 to 319 tokens, and one bar for longer texts."""

MARKS = (CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH)
"""Context lengths of CLIP and Long-CLIP."""

THUMBNAIL_SIDE = 192
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
        try:
            image = decode_image(self.image or b"")
        except ImageError:
            return None
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def render_report(
    title: str,
    facts: Sequence[tuple[str, str]],
    rejected: Sequence[tuple[str, str, int]],
    histograms: Sequence[Histogram],
    samples: Sequence[Sample],
    settings: Mapping[str, Any],
) -> str:
    """Render the report as one HTML file. All texts are escaped, because they come from the data.

    Args:
        title: heading.
        facts: names and values.
        rejected: (stage, reason, number of rows).
        histograms: distributions of text lengths.
        samples: rows to show.
        settings: settings of the job.
    """
    return TEMPLATES.get_template("data/report.html").render(
        title=title,
        facts=facts,
        rejected=sorted(rejected, key=lambda line: -line[2])[:MAX_REASONS],
        more_reasons=max(0, len(rejected) - MAX_REASONS),
        histograms=[histogram for histogram in histograms if histogram.texts],
        marks=[(mark, mark / BIN_TOKENS / (BINS + 1)) for mark in MARKS],
        samples=samples,
        settings=yaml.safe_dump(dict(settings), sort_keys=False),
    )
