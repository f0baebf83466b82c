"""HiMo@K (arXiv 2511.06653): does the similarity of an image and its caption grow as the caption gets longer?

For K of 2 and 3 a caption is cut into K parts of about as many sentences, and similarity must grow strictly with each
part that is added. For captions that come in K growing parts, the figure is the correlation of similarity with K.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from longclip.text.sentences import split_sentences
from pipelines.evaluation.questions.rows import Embedded, Row, image_groups
from pipelines.evaluation.scores import ROUNDING, Score

PREFIXES: dict[str, tuple[int, int]] = {"first_half": (1, 2), "first_third": (1, 3), "first_two_thirds": (2, 3)}
"""Beginnings of a caption by their name: (k, K) of the first k of K parts."""

GROWING: dict[str, tuple[str, ...]] = {"himo@2": ("first_half",), "himo@3": ("first_third", "first_two_thirds")}
"""Beginnings that come before the whole caption, by the figure."""


def prefix(name: str, caption: str) -> str:
    """The beginning of a caption; the caption itself if it has fewer sentences than there are parts.

    The first k of K parts of n sentences are the first k x n / K, rounded down: of five sentences in three parts, the
    first part is one sentence, and the others are two, as in the paper's example.
    """
    part, parts = PREFIXES[name]
    sentences = split_sentences(caption)
    if len(sentences) < parts:
        return caption
    return "".join(sentences[: part * len(sentences) // parts]).strip() or caption


def growth_scores(
    similarities: Mapping[str, np.ndarray],
    applies: Mapping[str, np.ndarray],
    queries: Sequence[str],
    groups: np.ndarray,
) -> dict[str, Score]:
    """HiMo@2 and HiMo@3 of captions; without those with too few sentences, and without a figure that none has.

    Args:
        similarities: `[M]` of each caption and its image, for the whole caption (`whole`) and by the name of a prefix.
        applies: `[M]` whether a prefix differs from the caption, by the name of the prefix.
        queries: ids of the captions.
        groups: `[M]` row of the image of each caption.
    """
    scores = {}
    for figure, names in GROWING.items():
        chosen = np.array([applies[name] for name in names]).min(axis=0)
        growing = np.stack([similarities[name] for name in (*names, "whole")])
        right = np.diff(growing, axis=0).min(axis=0) > ROUNDING
        if chosen.any():
            ids = tuple(query for query, is_chosen in zip(queries, chosen, strict=True) if is_chosen)
            scores[figure] = Score(right[chosen].astype(np.float64), ids, groups[chosen])
    return scores


class GrowingCaptions:
    """Images with captions that get longer: the correlation of similarity with the position."""

    FIGURE = "himo@k"

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.groups = rows, image_groups(rows)

    def scores(self, embedded: Mapping[str, Embedded]) -> dict[str, Score]:
        """See `QuestionSet`."""
        asked = [row for row in self.rows if row.id in embedded]
        if not asked:
            return {}
        values = np.array([_correlation(embedded[row.id].similarities()) for row in asked])
        groups = np.array([self.groups[row.id] for row in asked])
        ids = tuple(row.id for row in asked)
        return {self.FIGURE: Score(values, ids, groups, is_main=True, chance=0.0, bounds=(-1.0, 1.0))}


def _correlation(values: np.ndarray) -> float:
    """Pearson's correlation of values with their positions; 0 if all are equal, as in the authors' script."""
    if np.ptp(values) <= ROUNDING:
        return 0.0
    return float(np.corrcoef(np.arange(len(values)), values.astype(np.float64))[0, 1])
