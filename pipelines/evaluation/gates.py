"""Conditions that a candidate must meet to replace the champion."""

from collections.abc import Sequence
from dataclasses import dataclass

from longclip.evaluation.significance import Comparison
from pipelines.common.tables import Table
from pipelines.evaluation.report import change_text, title_of
from pipelines.evaluation.tasks import Task


@dataclass(frozen=True)
class Gate:
    """One direction, or main score, of one task."""

    task: str
    direction: str
    margin: float | None
    """Maximum share of hits that may be lost; None if the candidate must have at least as many hits."""
    comparison: Comparison
    """Candidate compared with champion."""

    @property
    def holds(self) -> bool:
        """Whether the candidate passes.

        Long text: at least as many hits as the champion. Others: the interval of the difference is above the allowed
        loss, so a set too small to show that does not pass.
        """
        if self.margin is None:
            return self.comparison.difference >= 0
        return self.comparison.low > -self.margin

    @property
    def rule(self) -> str:
        """The condition in words."""
        return "up or equal" if self.margin is None else f"interval above -{100 * self.margin:g}"

    def metrics(self) -> dict[str, float]:
        """The difference of hits at 1 (a share), its interval and p value, and whether the gate holds, for MLflow."""
        name, comparison = f"{self.task}/{self.direction}", self.comparison
        return {
            f"{name}/difference": comparison.difference,
            f"{name}/low": comparison.low,
            f"{name}/high": comparison.high,
            f"{name}/p_value": comparison.p_value,
            f"{name}/holds": float(self.holds),
        }


def gate(task: Task, direction: str, comparison: Comparison, margin: float) -> Gate:
    """The gate of a task: long text must not lose, short text and classification not more than the margin."""
    return Gate(task.name, direction, None if task.protocol.text == "long" else margin, comparison)


def gate_table(gates: Sequence[Gate], champion: str, candidate: str) -> Table:
    """All gates as a table of a report."""
    return Table(
        f"Version {candidate} against champion {champion}, the same queries, at 1",
        ["task", "direction", "must hold", "verdict", "change, points", "better", "worse", "p (paired)"],
        [
            [
                *(gate.task, title_of(gate.direction), gate.rule, "holds" if gate.holds else "FAILS"),
                *(change_text(gate.comparison.asdict()), str(gate.comparison.better), str(gate.comparison.worse)),
                f"{gate.comparison.p_value:.4f}",
            ]
            for gate in gates
        ],
        words=4,
    )
