"""What was measured of a model on a task: the rank of every query, kept with the id of the query."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longclip.errors import DataError
from longclip.evaluation.metrics import RECALL_AT, Ranks
from longclip.evaluation.significance import Comparison, compare_paired, mean_interval
from pipelines.evaluation.scores import ROUNDING, Score, write_tables

WHOLE = "whole"
"""Reading of the unchanged texts, up to the context length of the model."""


@dataclass(frozen=True)
class Answers:
    """Ranks of the queries of one direction, each with its id."""

    ranks: Ranks
    queries: tuple[str, ...]
    """Id of each query: the image's, and the number of the text for a text."""
    groups: np.ndarray
    """`[Q]` row of the image that each query belongs to."""

    def hits(self, k: int = 1) -> np.ndarray:
        """`[Q]` whether each query ranks a right candidate among the first k."""
        return (self.ranks.rank < k).numpy().astype(np.float64)

    def figures(self) -> dict[str, Any]:
        """Figures of `Ranks`; recall and mAP with the bounds of their intervals, as `{value, low, high}`."""
        values = {f"recall@{k}": self.hits(k) for k in RECALL_AT} | {"map": self.ranks.average_precision.numpy()}
        figures: dict[str, Any] = dict(self.ranks.figures())
        for name, value in values.items():
            low, high = mean_interval(value, self.groups)
            figures[name] = {"value": figures[name], "low": low, "high": high}
        return figures


@dataclass(frozen=True)
class Choices:
    """Whether images are closer to their captions than to hard negatives of these captions."""

    margins: np.ndarray
    """`[P]` score of each caption minus the score of its negative."""
    groups: np.ndarray
    """`[P]` row of the image that each caption belongs to."""
    texts: int
    """Number of captions, including those without a negative."""

    def figures(self) -> dict[str, float]:
        """Share of right choices with its interval (chance: 0.5), and the counts; equal scores are not right."""
        right = self.margins > ROUNDING
        low, high = mean_interval(right.astype(np.float64), self.groups)
        counts = {"right": int(right.sum()), "equal": int((np.abs(self.margins) <= ROUNDING).sum())}
        return {
            "value": float(right.mean()),
            "low": low,
            "high": high,
            **counts,
            "pairs": len(right),
            "texts": self.texts,
        }


@dataclass(frozen=True)
class Measured:
    """Measurement of a model on a task."""

    protocol: str
    """Name of the result; begins with NOT if the data was not that of the protocol."""
    context_length: int
    images: int
    texts: int | None
    """Number of texts; None for classification."""
    texts_cut: int
    """Number of texts that were truncated."""
    answers: dict[str, dict[str, Answers]]
    """Reading -> direction -> answers; `WHOLE` is always there."""
    rejected: dict[str, str]
    """Reason by the id of each unusable row."""
    choices: dict[str, Choices] = field(default_factory=dict)
    """Choices by kind of hard negative, for long texts; only kinds that occurred."""
    unchanged: dict[str, int] = field(default_factory=dict)
    """Number of texts that are too short for a change, by its name."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Scores of questions, and of the growth of similarity with the text, by their name."""

    @property
    def whole(self) -> dict[str, Answers]:
        """Answers to the unchanged texts."""
        return self.answers[WHOLE]

    @property
    def compared(self) -> dict[str, Score]:
        """What models are compared by: the hits at 1 of each direction, and the main scores."""
        hits = {name: Score(answers.hits(), answers.queries, answers.groups) for name, answers in self.whole.items()}
        return hits | {name: score for name, score in self.scores.items() if score.is_main}


def compare(a: Measured, b: Measured, name: str) -> Comparison:
    """Paired comparison of two models by one of `Measured.compared`, queries matched by their ids.

    Raises:
        DataError: the models did not get the same queries.
    """
    first, second = a.compared[name], b.compared[name]
    if first.queries != second.queries:
        different = set(first.queries) ^ set(second.queries)
        raise DataError(f"{len(different)} queries were given to one model only, e.g. '{min(different)}'")
    return compare_paired(first.values, second.values, first.groups, bounds=first.bounds)


def write_ranks(measured: Measured, path: Path) -> None:
    """Write the rank of every query, if any were ranked, as a Parquet `direction, query, group, rank, ties,
    average_precision`."""
    tables = [
        pa.table(
            {
                "direction": [direction] * len(answers.queries),
                "query": list(answers.queries),
                "group": answers.groups,
                "rank": answers.ranks.rank.numpy(),
                "ties": answers.ranks.ties.numpy(),
                "average_precision": answers.ranks.average_precision.numpy(),
            }
        )
        for direction, answers in measured.whole.items()
    ]
    write_tables(tables, path)
