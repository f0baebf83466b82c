"""The models that a study trains: the paper's arms, and variations of the last one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning."""

    title: str
    positions: str
    """How the position table is lengthened; empty if nothing is trained."""
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
"""Arms to compare: by how much the second is better than the first."""


@dataclass(frozen=True)
class Cell:
    """A model of the study. The last three fields are set for arms that match components."""

    arm: str
    seed: int
    weight: float = 0.0
    strategy: str = ""
    pca_dim: int = 0

    @property
    def name(self) -> str:
        """Its name in results and on disk."""
        name = f"{self.arm}-{self.seed}"
        return f"{name}-w{self.weight:g}-{self.strategy}-d{self.pca_dim}" if self.weight else name


@dataclass(frozen=True)
class Stage:
    """Models to compare with each other."""

    title: str
    rows: dict[str, list[Cell]]
    """Cells by the label of their row; the cells of a row differ only in their seeds."""
    pairs: list[tuple[str, str]]
    """Rows to compare, the reference first."""

    @property
    def cells(self) -> list[Cell]:
        """All cells, ordered by seed."""
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
    """The paper's arms, then variations of the last one: one value at a time and, with `combine`, all combinations.

    Args:
        seeds: seeds of the arms.
        varied_seeds: seeds of the variations.
        usual: weight, strategy and number of components, unless varied.
        weights: weights of the summary loss; 0 is the arm without component matching.
        strategies: summary strategies.
        pca_dims: numbers of components.
        combine: also train every combination of them.
    """

    def row(arm: str, of: Sequence[int], weight: float, strategy: str, pca_dim: int) -> list[Cell]:
        matches = ARMS[arm].matches_components
        return [Cell(arm, seed, weight, strategy, pca_dim) if matches else Cell(arm, seed) for seed in of]

    def varied(weight: float, strategy: str, pca_dim: int) -> list[Cell]:
        return row("both" if weight else "kps", varied_seeds, weight, strategy, pca_dim)

    def stage(title: str, rows: dict[str, list[Cell]], reference: str) -> Stage:
        rows = rows | {reference: varied(*usual)}  # also if it was not listed
        return Stage(title, rows, [(reference, label) for label in rows if label != reference])

    weight, strategy, pca_dim = usual
    arms = {ARMS[name].title: row(name, seeds, *usual) for name in ARMS}
    titles = [(ARMS[one].title, ARMS[other].title) for one, other in PAIRS]
    by_weight = {f"{other:g}": varied(other, strategy, pca_dim) for other in weights}
    by_strategy = {other: varied(weight, other, pca_dim) for other in strategies}
    by_dim = {str(other): varied(weight, strategy, other) for other in pca_dims}
    plan = [
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
        plan.append(stage("Combinations", together, f"{strategy}, weight {weight:g}, {pca_dim} components"))
    return plan
