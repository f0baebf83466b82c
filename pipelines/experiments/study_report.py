"""Results of a study: means over seeds, intervals over queries, paired comparisons, and a plot of every stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from longclip.evaluation.significance import Comparison, compare_paired, mean_interval
from pipelines.common.plots import Interval, interval_plot
from pipelines.common.tables import Table
from pipelines.evaluation.report import DIRECTIONS, change_text
from pipelines.experiments.cells import Cell, Stage


@dataclass(frozen=True)
class Line:
    """Models that differ only in their seeds, on one task and direction."""

    task: str
    direction: str
    hits: np.ndarray
    """`[Q, S]` whether each query ranks a right candidate first, with the model of each seed."""
    groups: np.ndarray
    """`[Q]` which queries belong together."""

    @property
    def title(self) -> str:
        """Task and direction."""
        return f"{self.task}, {DIRECTIONS[self.direction]}"

    @property
    def by_seed(self) -> list[float]:
        """Recall at 1 of each seed."""
        return self.hits.mean(0).tolist()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean over queries, which are resampled in whole groups with all seeds."""
        return mean_interval(self.hits.mean(1), self.groups)

    def better_than(self, other: "Line") -> "Change":
        """Paired comparison on the same queries, each averaged over the seeds."""
        comparison = compare_paired(other.hits.mean(1), self.hits.mean(1), self.groups)
        return Change(comparison, (self.hits.mean(0) - other.hits.mean(0)).tolist())

    def asdict(self) -> dict[str, Any]:
        """As JSON."""
        low, high = self.interval
        figures = {"by_seed": self.by_seed, "mean": float(np.mean(self.by_seed)), "low": low, "high": high}
        return {"task": self.task, "direction": self.direction, "queries": len(self.hits), "recall@1": figures}

    def cell(self) -> str:
        """Mean and interval, and each seed if there are several."""
        low, high = self.interval
        return f"{100 * np.mean(self.by_seed):.1f} [{100 * low:.1f}, {100 * high:.1f}]{_each(self.by_seed, '.1f')}"


@dataclass(frozen=True)
class Change:
    """Difference of two lines."""

    comparison: Comparison
    by_seed: list[float]
    """Difference of each seed."""

    def asdict(self) -> dict[str, Any]:
        """As JSON."""
        return self.comparison.asdict() | {"by_seed": self.by_seed}

    def cell(self) -> str:
        """Difference with its interval, each seed's if there are several, and the p value of the test."""
        p_value = self.comparison.p_value
        p_text = f"p {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"
        return f"{change_text(self.comparison.asdict())}{_each(self.by_seed, '+.1f')}, {p_text}"


@dataclass(frozen=True)
class StageResult:
    """Results of a stage."""

    title: str
    lines: dict[str, list[Line]]
    """Lines by the label of the model, one for each task and direction."""
    pairs: list[tuple[str, str]]

    @property
    def slug(self) -> str:
        """File name of its plot."""
        return self.title.lower().replace(" ", "-")

    @property
    def columns(self) -> list[str]:
        """Titles of tasks and directions."""
        return [line.title for line in next(iter(self.lines.values()))]

    def changes(self) -> dict[tuple[str, str], list[Change]]:
        """By how much the second of each pair is better, on every task and direction."""
        return {
            (one, other): [
                line.better_than(reference) for reference, line in zip(self.lines[one], self.lines[other], strict=True)
            ]
            for one, other in self.pairs
        }

    def asdict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "stage": self.title,
            "models": {label: [line.asdict() for line in lines] for label, lines in self.lines.items()},
            "comparisons": [
                {"of": other, "against": one, "column": column} | change.asdict()
                for (one, other), changes in self.changes().items()
                for column, change in zip(self.columns, changes, strict=True)
            ],
        }

    def tables(self) -> list[Table]:
        """Recall, and the paired comparisons."""
        rows = [
            [_short(other), _short(one), *(change.cell() for change in changes)]
            for (one, other), changes in self.changes().items()
        ]
        return [
            Table(
                f"{self.title}: recall at 1 in percent, 95 % interval over queries (each seed)",
                ["model", *self.columns],
                [[label, *(line.cell() for line in lines)] for label, lines in self.lines.items()],
            ),
            Table(
                f"{self.title}: change in points on the same queries, 95 % interval (each seed), p of a paired test",
                ["of", "against", *self.columns],
                rows,
                words=2,
            ),
        ]


@dataclass(frozen=True)
class StudyReport:
    """Results of the stages that are complete."""

    stages: list[StageResult]

    def asdict(self) -> list[dict[str, Any]]:
        """As JSON."""
        return [result.asdict() for result in self.stages]

    def markdown(self) -> str:
        """As Markdown."""
        tables = [table.markdown() for result in self.stages for table in result.tables()]
        return "\n\n".join(["# Study", *tables]) + "\n"


def _each(seeds: Sequence[float], form: str) -> str:
    return f" ({', '.join(format(100 * seed, form) for seed in seeds)})" if len(seeds) > 1 else ""


def _short(label: str) -> str:
    return label.partition(":")[0]


def stage_result(stage: Stage, cells: Path) -> StageResult:
    """Results of a stage, from the ranks that each cell's benchmark wrote in `cells`."""
    return StageResult(stage.title, {label: _lines(row, cells) for label, row in stage.rows.items()}, stage.pairs)


def _lines(row: Sequence[Cell], cells: Path) -> list[Line]:
    lines = []
    ranks = cells / row[0].name / "ranks"
    for task in sorted(path.name.removesuffix(f".{row[0].name}.parquet") for path in ranks.iterdir()):
        files = [cells / cell.name / "ranks" / f"{task}.{cell.name}.parquet" for cell in row]
        tables = [pq.read_table(file).to_pandas() for file in files]
        for direction in tables[0]["direction"].unique():
            parts = [table[table["direction"] == direction].sort_values("query") for table in tables]
            hits = np.stack([(part["rank"] == 0).to_numpy(np.float64) for part in parts], 1)
            lines.append(Line(task, str(direction), hits, parts[0]["group"].to_numpy()))
    return lines


def stage_plot(result: StageResult) -> str:
    """Recall at 1 of a stage's models on every task, as SVG: each seed, their mean, and its interval."""
    rows = {
        label: [
            Interval(100 * line.interval[0], 100 * line.interval[1], 100 * mean, [100 * seed for seed in line.by_seed])
            for line, mean in ((line, float(np.mean(line.by_seed))) for line in lines)
        ]
        for label, lines in result.lines.items()
    }
    return interval_plot(result.columns, rows, "recall at 1, percent")
