"""Long texts read with changes on purpose, and how much recall each change costs."""

from collections.abc import Iterator
from itertools import count, takewhile
from typing import Any

import numpy as np

from longclip.evaluation.significance import compare_paired, relative_change_interval
from longclip.text.perturbations import CHANGES
from pipelines.common.embedding import Reading
from pipelines.evaluation.measured import Answers, Measured


def perturbed_readings(draws: int) -> dict[str, Reading]:
    """Readings with each change: random ones as many times as there are draws, the others once."""
    return {
        reading_name(change, draw): Reading("captions", change=change, draw=draw)
        for change, properties in CHANGES.items()
        for draw in range(draws if properties.is_random else 1)
    }


def reading_name(change: str, draw: int) -> str:
    """Name of the reading of a draw of a change."""
    return f"{change}_{draw}"


def perturbation_results(measured: Measured, direction: str) -> dict[str, dict[str, Any]]:
    """Recall at 1 with each change, and the loss against the whole text, as JSON.

    Recall is the mean of the draws. `relative_change` is in shares of the whole text's recall: -0.2 is a loss of 20 %.
    It is None where nothing is found with the whole text, and its bounds where too little is for an interval.
    """
    readings = measured.answers
    return {
        change: _result(
            measured.whole[direction],
            [readings[name][direction] for name in takewhile(readings.__contains__, _reading_names(change))],
            measured.unchanged.get(change, 0),
        )
        for change in CHANGES
        if reading_name(change, 0) in readings
    }


def _reading_names(change: str) -> Iterator[str]:
    return (reading_name(change, draw) for draw in count())


def _result(whole: Answers, draws: list[Answers], unchanged: int) -> dict[str, Any]:
    before, after = whole.hits(), np.stack([answers.hits() for answers in draws])
    bounds = relative_change_interval(before, after, whole.groups)
    relative = float(after.mean() / before.mean() - 1) if before.any() else None
    low, high = bounds or (None, None)
    return {
        "recall@1": float(after.mean()),
        "draws": len(draws),
        "texts_unchanged": unchanged,
        "relative_change": {"value": relative, "low": low, "high": high},
        **compare_paired(before, after.mean(0), whole.groups).asdict(),
    }
