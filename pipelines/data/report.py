"""The data report: an HTML file with counts, text lengths in CLIP tokens, reasons for rejection, and samples."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipelines.common.pages import TEMPLATES
from pipelines.common.rejected_rows import SAMPLES_PER_REASON, without_values
from pipelines.common.thumbnails import thumbnail
from pipelines.data.histograms import Histogram

MAX_REASONS = 50


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
        histograms: distributions of text lengths or scores.
        samples: rows to show.
        settings: settings of the job.
        rejected_samples: rejected rows to show.
    """
    return TEMPLATES.get_template("data/report.html").render(
        title=title,
        facts=facts,
        rejected=sorted(rejected, key=lambda line: -line[2])[:MAX_REASONS],
        more_reasons=max(0, len(rejected) - MAX_REASONS),
        histograms=[histogram for histogram in histograms if histogram.count],
        samples=samples,
        rejected_samples=rejected_samples,
        settings=yaml.safe_dump(dict(settings), sort_keys=False),
    )
