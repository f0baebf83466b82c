"""Statistical significance: bootstrap intervals, and a paired test of two models on the same queries.

Queries that share an image (such as its five captions) are not independent, so whole groups are drawn, not single
queries. Everything is seeded: the same measurements give the same intervals.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_ONCE = 4 * 1024 * 1024


@dataclass(frozen=True)
class Comparison:
    """Model B against model A, on the same queries."""

    difference: float
    """Mean of B minus mean of A."""
    low: float
    high: float
    """Bounds of the bootstrap interval of the difference."""
    p_value: float
    """Probability of a difference at least as large, in either direction, if the two models were interchangeable."""
    better: int
    worse: int
    """Queries on which B is better, and worse, than A."""
    queries: int

    def asdict(self) -> dict[str, float]:
        """As a JSON object."""
        return asdict(self)


def mean_interval(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), over groups of queries.

    Two artificial groups of mean size are added, one with the lowest and one with the highest possible value. Without
    them, 40 hits of 40 would have an interval of zero width, as if the next 40 had to be hits too. The idea is that of
    Agresti and Coull (1998); if all values are equal it gives the rule of three, 3 / Q.

    Args:
        values: `[Q]` value of each query, e.g. whether it is a hit at 1.
        groups: `[Q]` integer group of each query; None if each query is a group.
        level: share of intervals that contain the true mean.
        resamples: draws.
        bounds: lowest and highest value that a query can have.
    """
    sums, counts = _grouped(np.asarray(values, np.float64), groups)
    size = counts.mean()
    sums, counts = np.append(sums, size * np.array(bounds)), np.append(counts, [size, size])
    means = np.concatenate([drawn @ sums / (drawn @ counts) for drawn in _resampled(len(sums), resamples)])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def compare_paired(
    a: np.ndarray,
    b: np.ndarray,
    groups: np.ndarray | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Comparison:
    """Paired comparison of two models: bootstrap interval of the difference, and a sign-flip permutation test.

    Under the null hypothesis, the models may be swapped within any group of queries. For single queries with a hit or a
    miss this is McNemar's exact test, by simulation; the smallest possible p is 1 / (resamples + 1).

    Args:
        a: `[Q]` value of each query under model A, within `bounds`.
        b: `[Q]` the same query under model B.
        groups: see `mean_interval`.
        level: see `mean_interval`.
        resamples: draws of the bootstrap, and of the test.
        bounds: see `mean_interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are not pairs")
    change = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    low, high = mean_interval(change, groups, level, resamples, (bounds[0] - bounds[1], bounds[1] - bounds[0]))
    sums, _ = _grouped(change, groups)
    draw = np.random.default_rng(1)
    size = max(1, _DRAWS_AT_ONCE // len(sums))
    swapped = np.concatenate(
        [
            draw.choice([-1.0, 1.0], size=(min(size, resamples - start), len(sums))) @ sums
            for start in range(0, resamples, size)
        ]
    )
    # Sums in another order differ by rounding; treat them as equal to the observed one.
    extreme = np.count_nonzero(np.abs(swapped) >= abs(sums.sum()) - 1e-9 * max(1.0, np.abs(sums).sum()))
    return Comparison(
        difference=float(change.mean()),
        low=low,
        high=high,
        p_value=(1 + extreme) / (1 + resamples),
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
        queries=len(change),
    )


def relative_change_interval(
    whole: np.ndarray,
    changed: np.ndarray,
    groups: np.ndarray | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of mean(changed) / mean(whole) - 1, over groups of queries and over draws.

    As in `mean_interval`, two artificial groups are added: one that loses all, and one that gains all.

    Args:
        whole: `[Q]` value of each query without the change, between 0 and 1.
        changed: `[D, Q]` the same queries in D random draws of the change.
        groups: see `mean_interval`.
        level: see `mean_interval`.
        resamples: number of resamples.

    Returns:
        The bounds, or None if `whole` is 0 in a resample: some seven hits are too few for a ratio.
    """
    size = _grouped(whole, groups)[1].mean()
    before = np.append(_grouped(np.asarray(whole, np.float64), groups)[0], [size, 0.0])
    after = np.stack(
        [np.append(_grouped(np.asarray(values, np.float64), groups)[0], [0.0, size]) for values in changed]
    )
    draw, draws = np.random.default_rng(2), len(changed)
    ratios = []
    for drawn in _resampled(len(before), resamples):
        weights = draw.multinomial(draws, np.full(draws, 1 / draws), size=len(drawn)) / draws
        total = drawn @ before
        if not total.all():
            return None
        ratios.append((drawn @ after.T * weights).sum(1) / total - 1)
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def _grouped(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group."""
    if groups is None:
        return values, np.ones(len(values))
    _, place = np.unique(groups, return_inverse=True)
    return np.bincount(place, values), np.bincount(place).astype(np.float64)


def _resampled(groups: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each group is drawn `[n, G]`, for some of the resamples at a time."""
    draw = np.random.default_rng(0)
    size = max(1, _DRAWS_AT_ONCE // groups)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = draw.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
