"""The data report: one HTML file with counts, lengths in CLIP tokens, reasons of rejection, and samples."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from longclip.errors import ImageError
from longclip.images import decode_image
from pipelines.common.pages import TEMPLATES

BIN_TOKENS, BINS = 8, 40
"""Bars of the histogram: 0 to 319 tokens, and one bar for all above."""

MARKS = (77, 248)
"""Context lengths of CLIP and Long-CLIP."""

THUMBNAIL_SIDE = 192
MAX_REASONS = 50


@dataclass(frozen=True)
class Histogram:
    """Lengths of texts."""

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
        """Length that half of the texts do not exceed."""
        seen = 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if 2 * seen >= self.texts:
                return length
        return 0

    @property
    def bars(self) -> list[dict[str, Any]]:
        """Bars of the picture: range of tokens, number of texts, height between 0 and 1."""
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
        """Figures for a manifest."""
        figures: dict[str, float] = {"texts": self.texts, "mean": round(self.mean, 1), "median": self.median}
        figures["max"] = max(self.counts, default=0)
        return figures | {f"share_over_{mark}": round(self.share_over(mark), 4) for mark in MARKS}


@dataclass(frozen=True)
class Sample:
    """A row for people to look at."""

    id: str
    image: bytes | None
    """Encoded image; None where the set has none."""
    caption: str
    summaries: Mapping[str, str]
    """Source -> text."""
    tokens: int
    """CLIP tokens of the caption."""

    @property
    def thumbnail(self) -> str | None:
        """The image as a small data URI; None where there is none or it cannot be read."""
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
    """The report as one HTML file. All texts are escaped: ids, captions and reasons come from the data.

    Args:
        title: heading.
        facts: names and values.
        rejected: (stage, reason, rows) of what was left out.
        histograms: lengths of texts.
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
