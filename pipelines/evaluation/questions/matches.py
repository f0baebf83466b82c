"""Retrieval with several right answers in both directions, as in ECCV Caption: mAP@R, R-precision and recall at 1."""

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch

from longclip.evaluation.metrics import distinct_rows
from pipelines.evaluation.questions.rows import Embedded, Row
from pipelines.evaluation.scores import Score

QUERIES_AT_ONCE = 256
FIGURES = ("recall@1", "r-precision", "map@r")


class MatchedRetrieval:
    """Images with captions, and the matches of some images and of some captions."""

    def __init__(
        self,
        rows: Sequence[Row],
        caption_ids: Mapping[str, Sequence[str]],
        image_to_text: Mapping[str, Set[str]],
        text_to_image: Mapping[str, Set[str]],
    ) -> None:
        """
        Args:
            rows: all images, with their captions.
            caption_ids: ids of the captions of each row.
            image_to_text: ids of the right captions of each image that is a query. Captions that are not in `rows`
                count as not found.
            text_to_image: ids of the right images of each caption that is a query.
        """
        self.rows, self.caption_ids = rows, caption_ids
        self.image_to_text, self.text_to_image = image_to_text, text_to_image

    def scores(self, embedded: Mapping[str, Embedded]) -> dict[str, Score]:
        """See `QuestionSet`."""
        present = [row.id for row in self.rows if row.id in embedded]
        if not present:
            return {}
        images = np.stack([embedded[row].image for row in present])
        texts = np.concatenate([embedded[row].texts for row in present])
        captions = [caption for row in present for caption in self.caption_ids[row]]
        image_of_caption = [number for number, row in enumerate(present) for _ in self.caption_ids[row]]
        directions = {
            "image_to_text": (present, images, captions, texts, self.image_to_text, range(len(present))),
            "text_to_image": (captions, texts, present, images, self.text_to_image, image_of_caption),
        }
        scores = {}
        for direction, (queries, of_queries, candidates, of_candidates, matches, groups) in directions.items():
            asked = [number for number, query in enumerate(queries) if query in matches]
            if not asked:
                continue
            values = precisions(of_queries[asked], of_candidates, candidates, [matches[queries[n]] for n in asked])
            ids, numbers = tuple(queries[number] for number in asked), np.array([groups[number] for number in asked])
            for place, figure in enumerate(FIGURES):
                is_main = figure == "map@r"
                scores[f"{direction}/{figure}"] = Score(values[:, place], ids, numbers, is_main)
        return scores


def precisions(
    queries: np.ndarray, candidates: np.ndarray, candidate_ids: Sequence[str], right: Sequence[Set[str]]
) -> np.ndarray:
    """Recall at 1, R-precision and mAP@R of each query; R is the number of its right answers.

    A wrong candidate with the same score as a right one is ranked before it.

    Args:
        queries: `[Q, D]` unit length.
        candidates: `[C, D]` unit length.
        candidate_ids: ids of the C candidates.
        right: ids of the right answers of each query, at least one.

    Returns:
        `[Q, 3]`.
    """
    figures = np.empty((len(queries), len(FIGURES)))
    places = {candidate: number for number, candidate in enumerate(candidate_ids)}
    different, place = distinct_rows(torch.from_numpy(candidates))
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        scores = queries[start : start + QUERIES_AT_ONCE] @ different.numpy().T
        if place is not None:
            scores = scores[:, place]
        for number, row in enumerate(scores, start):
            is_right = np.zeros(len(places), bool)
            is_right[[places[match] for match in right[number] if match in places]] = True
            first = np.lexsort((is_right, -row))[: len(right[number])]
            hits = is_right[first].astype(np.float64)
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            # Fewer candidates than right answers: the missing places are misses.
            size = len(right[number])
            figures[number] = hits[0], hits.sum() / size, (hits * precision).sum() / size
    return figures
