"""Curves of a training run, for its page in MLflow."""

import io
from collections.abc import Mapping, Sequence


def curves_svg(history: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """A plot of each quantity over steps, one below the other.

    Args:
        history: (step, value) pairs by name.
    """
    from matplotlib.figure import Figure  # takes a second to import, and only this needs it

    figure = Figure((6.4, 1.7 * len(history)), layout="constrained")
    axes = figure.subplots(len(history), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, points) in zip(axes, history.items(), strict=True):
        axis.plot(*zip(*sorted(points), strict=True), color="#1f5fbf", linewidth=1.2)
        axis.set_title(name, fontsize=9, loc="left")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step", fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
