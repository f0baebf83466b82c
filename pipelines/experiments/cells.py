"""What a study trains: the arms of the paper's comparison, and what is varied around the last of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning."""

    title: str
    positions: str
    """How the position table is made longer; empty where nothing is trained."""
    matches_components: bool


ARMS = {
    "none": Arm("none: no fine-tuning, 77 tokens", "", False),
    "direct": Arm("direct: plainly interpolated", "interpolate", False),
    "kps": Arm("KPS: knowledge-preserving stretch", "stretch", False),
    "pcm": Arm("PCM: component matching, interpolated", "interpolate", True),
    "both": Arm("both: Long-CLIP", "stretch", True),
}
PAIRS = [
    ("none", "direct"),
    ("none", "both"),
    ("direct", "kps"),
    ("direct", "pcm"),
    ("direct", "both"),
    ("kps", "both"),
    ("pcm", "both"),
]
"""Arms that are compared: what the second does better than the first."""


@dataclass(frozen=True)
class Cell:
    """A model of the study."""

    arm: str
    seed: int
    weight: float = 0.0
    strategy: str = ""
    pca_dim: int = 0
    """How summaries are made, how much they weigh and how many components they are matched to: for arms that do."""

    @property
    def name(self) -> str:
        """Names it in results and on disk."""
        name = f"{self.arm}-{self.seed}"
        return f"{name}-w{self.weight:g}-{self.strategy}-d{self.pca_dim}" if self.weight else name


@dataclass(frozen=True)
class Stage:
    """Models that are compared with each other."""

    title: str
    rows: dict[str, list[Cell]]
    """By what tells them apart; the cells of a row differ in their seeds only."""
    pairs: list[tuple[str, str]]
    """Rows that are compared, the one that is the yardstick first."""

    @property
    def cells(self) -> list[Cell]:
        """Its models, seed by seed."""
        return sorted((cell for row in self.rows.values() for cell in row), key=lambda cell: cell.seed)


def stages(
    seeds: Sequence[int],
    varied_seeds: Sequence[int],
    usual: tuple[float, str, int],
    weights: Sequence[float],
    strategies: Sequence[str],
    pca_dims: Sequence[int],
    combine: bool,
) -> list[Stage]:
    """The arms of the paper, then what is varied around the last of them, one thing at a time and, if asked, together.

    Args:
        seeds: of the arms.
        varied_seeds: of all else.
        usual: weight, strategy and number of components where they are not varied.
        weights: weights of the summary loss; 0 is the arm without.
        strategies: ways to summarize.
        pca_dims: numbers of components.
        combine: also train every combination of them.
    """

    def row(arm: str, of: Sequence[int], weight: float, strategy: str, pca_dim: int) -> list[Cell]:
        matches = ARMS[arm].matches_components
        return [Cell(arm, seed, weight, strategy, pca_dim) if matches else Cell(arm, seed) for seed in of]

    def varied(weight: float, strategy: str, pca_dim: int) -> list[Cell]:
        return row("both" if weight else "kps", varied_seeds, weight, strategy, pca_dim)

    def stage(title: str, rows: dict[str, list[Cell]], yardstick: str) -> Stage:
        rows = rows | {yardstick: varied(*usual)}  # which is compared with whether it was listed or not
        return Stage(title, rows, [(yardstick, label) for label in rows if label != yardstick])

    weight, strategy, pca_dim = usual
    arms = {ARMS[name].title: row(name, seeds, *usual) for name in ARMS}
    titles = [(ARMS[one].title, ARMS[other].title) for one, other in PAIRS]
    by_weight = {f"{other:g}": varied(other, strategy, pca_dim) for other in weights}
    by_strategy = {other: varied(weight, other, pca_dim) for other in strategies}
    by_dim = {str(other): varied(weight, strategy, other) for other in pca_dims}
    found = [
        Stage("Arms", arms, titles),
        stage("Weight of the summary loss", by_weight, f"{weight:g}"),
        stage("Summary strategy", by_strategy, strategy),
        stage("Principal components", by_dim, str(pca_dim)),
    ]
    if combine:
        together = {
            f"{kind}, weight {other:g}, {dim} components": varied(other, kind, dim)
            for kind, other, dim in product(strategies, filter(None, weights), pca_dims)
        }
        found.append(stage("Combinations", together, f"{strategy}, weight {weight:g}, {pca_dim} components"))
    return found
