"""Primary components forward and backward: `longclip.primary_components` against a differentiated SVD.

The rival is what the official code does: `torch.linalg.svd` of the centred features, and autograd through it. Both get
the same float32 features, whose spectrum falls as that of real ones does. First values and gradients are compared with
float64: ours must be as near as 1e-5, else exit code 1.

    python tests/bench/bench_pcm.py [--quick]

One thread, process CPU time. The last line is JSON; `ratio` is the rival's time over ours, the smaller one at
2048 rows.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness import alternating, arguments, report
from longclip.training.pcm import primary_components

PCA_DIM = 32
SIZES = [(256, 512), (2048, 512), (2048, 768)]
"""Rows and columns."""


def by_svd(features: Tensor, pca_dim: int) -> Tensor:
    """The official way."""
    mean = features.mean(0)
    _, _, vectors = torch.linalg.svd(features - mean, full_matrices=False)
    leading = vectors[:pca_dim].T
    return (features - mean) @ leading @ leading.T + mean


def features_of(rows: int, width: int) -> Tensor:
    """Unit rows around a common mean."""
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.5
    return normalize(torch.randn(rows, width, generator=draw) * spectrum + 0.1, dim=1)


def both_ways(function: Callable[[Tensor, int], Tensor], features: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    leaf = features.clone().requires_grad_()
    value = function(leaf, PCA_DIM)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), gradient


def error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Relative errors of value and gradient."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def main() -> None:
    """Compare, measure, report."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    figures = {}
    for rows, width in SIZES:
        features = features_of(rows, width)
        upstream = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        exact = both_ways(by_svd, features.double(), upstream.double())
        rivals = {"svd": by_svd, "ours": primary_components}
        errors = {name: error(both_ways(way, features, upstream), exact) for name, way in rivals.items()}
        if max(errors["ours"]) > 1e-5:
            sys.exit(f"error: {rows} x {width}: relative errors {errors['ours']} of value and gradient")
        runs = {name: partial(both_ways, way, features, upstream) for name, way in rivals.items()}
        seconds = alternating(runs, 5 if quick else 21, time.process_time)
        figures[f"{rows}x{width}"] = {
            "svd_milliseconds": round(1000 * seconds["svd"], 1),
            "ours_milliseconds": round(1000 * seconds["ours"], 1),
            "ratio": round(seconds["svd"] / seconds["ours"], 2),
            "gradient_error": {name: float(f"{values[1]:.1e}") for name, values in errors.items()},
        }
        print(f"{rows} x {width}: {figures[f'{rows}x{width}']}", flush=True)
    report("pcm", quick, ratio=min(figures[size]["ratio"] for size in ("2048x512", "2048x768")), sizes=figures)


if __name__ == "__main__":
    main()
