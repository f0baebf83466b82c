"""The effective length of a model: how many tokens of a long text it makes use of, where the queries can show it.

At each shorter length, the hits at 1 are compared with those of the whole text, query by query. The lengths are equal
if the whole interval of the difference is above a small loss, the margin. The shorter one is worse if the loss is
significant. Few queries may show neither; the effective length is then not reported.
"""

from collections.abc import Mapping
from typing import Any

from longclip.evaluation.significance import Comparison, compare_paired, mean_interval
from pipelines.evaluation.measured import Answers

MARGIN = 0.02
"""Loss of recall at 1, as a share, that still counts as equal: two points, which a thousand queries usually resolve."""

SIGNIFICANT = 0.05
EQUAL, WORSE, NOT_RESOLVED = "equal", "worse", "not resolved"


def verdict(difference: Comparison, margin: float) -> str:
    """Whether a length is equal to the whole text, worse, or neither can be shown."""
    if difference.low > -margin:
        return EQUAL
    return WORSE if difference.difference < 0 and difference.p_value < SIGNIFICANT else NOT_RESOLVED


def recall_by_length(by_length: Mapping[int, Answers], margin: float) -> dict[str, Any]:
    """Recall at 1 by the maximum number of tokens, and the effective length, as JSON.

    The effective length is the shortest one at and above which all are equal to the whole text. It is None, with the
    reason in `effective_length_reason`, if a length that is not resolved could be equal too, or if recall is so low
    that no more than the margin can be lost.

    Args:
        by_length: answers by maximum tokens, the whole text's last.
        margin: see `MARGIN`.
    """
    *lengths, context_length = by_length
    whole = by_length[context_length]
    compared = {
        length: compare_paired(whole.hits(), by_length[length].hits(), whole.groups) for length in reversed(lengths)
    }
    verdicts = {length: verdict(difference, margin) for length, difference in compared.items()}
    effective, reason = _effective_length(context_length, verdicts), None
    if whole.ranks.recall(1) <= margin:
        effective, reason = None, _nothing_to_lose(whole, margin)
    elif effective is None:
        unresolved = next(length for length, found in verdicts.items() if found == NOT_RESOLVED)
        reason = _too_few_queries(unresolved, compared[unresolved], margin)
    points: list[dict[str, Any]] = []
    for length, answers in by_length.items():
        low, high = mean_interval(answers.hits(), answers.groups)
        points.append({"tokens": length, "value": answers.ranks.recall(1), "low": low, "high": high})
        if length in compared:
            points[-1]["against_whole"] = compared[length].asdict() | {"verdict": verdicts[length]}
    return {
        "recall@1": points,
        "effective_length": effective,
        "effective_length_reason": reason,
        "effective_length_margin": margin,
    }


def _effective_length(context_length: int, verdicts: Mapping[int, str]) -> int | None:
    """The shortest length with only equal ones above it, or None if that is not resolved; the longest come first."""
    effective = context_length
    for length, found in verdicts.items():
        if found != EQUAL:
            return effective if found == WORSE else None
        effective = length
    return effective


def _too_few_queries(length: int, change: Comparison, margin: float) -> str:
    return (
        f"not resolved with {change.queries} queries: with {length} tokens the change is {100 * change.difference:+.1f}"
        f" points [{100 * change.low:+.1f}, {100 * change.high:+.1f}], neither above -{100 * margin:g} nor a"
        " significant loss"
    )


def _nothing_to_lose(whole: Answers, margin: float) -> str:
    return (
        f"not resolved with {len(whole.queries)} queries: recall at 1 of the whole text is"
        f" {100 * whole.ranks.recall(1):.1f} %, so no more than the margin of {100 * margin:g} points can be lost"
    )
