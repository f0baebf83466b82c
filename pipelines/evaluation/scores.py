"""Figures that are not ranks: the mean of what each question of a task gives, with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longclip.evaluation.significance import mean_interval

ROUNDING = 1e-6
"""Similarities that differ by less are equal: the same tokens in another batch differ by as much."""


@dataclass(frozen=True)
class Score:
    """What each of Q questions gives, such as whether it is answered right."""

    values: np.ndarray
    """`[Q]` value of each question."""
    queries: tuple[str, ...]
    """Id of each question."""
    groups: np.ndarray
    """`[Q]` number of the image that each question belongs to; intervals are over images."""
    is_main: bool = False
    """Whether models are compared by it."""
    chance: float | None = None
    """Mean value of a model that guesses, if it is known."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest value that a question can have."""

    def figures(self) -> dict[str, Any]:
        """`{value, low, high, queries, chance}`: the mean, its interval, and the number of questions."""
        low, high = mean_interval(self.values, self.groups, bounds=self.bounds)
        value = float(self.values.mean())
        return {"value": value, "low": low, "high": high, "queries": len(self.values), "chance": self.chance}


def write_scores(scores: Mapping[str, Score], path: Path) -> None:
    """Write the value of every question, if there are any, as a Parquet `score, query, group, value`."""
    tables = [
        pa.table(
            {
                "score": [name] * len(score.queries),
                "query": list(score.queries),
                "group": score.groups,
                "value": score.values,
            }
        )
        for name, score in scores.items()
    ]
    write_tables(tables, path)


def write_tables(tables: Sequence[pa.Table], path: Path) -> None:
    """Write tables of the same columns as one Parquet; no file if there are none."""
    if tables:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), path)
