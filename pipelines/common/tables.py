"""Tables of reports."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table, the same in Markdown and in HTML."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Leading columns of words; the others are numbers."""

    def markdown(self) -> str:
        """As Markdown."""
        rule = ["---"] * self.words + ["---:"] * (len(self.head) - self.words)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.head, rule, *map(_escaped, self.rows))]
        return "\n".join([f"**{self.title}**", "", *lines])


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
