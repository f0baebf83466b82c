"""Ranking metrics: retrieval in both directions with any number of captions per image, and classification.

Scores are float32 inner products, computed in blocks, so 31,000 images and 155,000 texts do not need a 20 GB matrix. A
wrong candidate with exactly the same score as the right one is ranked before it, and the number of such ties is
reported: a model that gives every pair the same score must not look perfect. Candidates with equal embeddings always
tie, whatever the rounding of the matrix product.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longclip.errors import DataError

RECALL_AT = (1, 5, 10)
BLOCK_SCORES = 16 * 1024 * 1024
"""Scores in memory at once: 64 MiB."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of the right candidates for Q queries in one direction; all figures are computed from them."""

    rank: Tensor
    """`[Q]` int64: wrong candidates ranked before the best right one. 0 is a hit at 1."""
    ties: Tensor
    """`[Q]` int64: how many of these have exactly its score."""
    average_precision: Tensor
    """`[Q]` float64: mean, over the right candidates, of the share of right ones up to each of them."""
    candidates: int
    """Number of candidates, right ones included."""

    def __len__(self) -> int:
        return len(self.rank)

    def recall(self, k: int) -> float:
        """Share of queries with a right candidate among the first `k`.

        With several right candidates one is enough, a hit rate, as in CLIP papers.
        """
        return (self.rank < k).double().mean().item()

    def figures(self, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
        """`recall@k` and `map` as shares, `median_rank` counted from 1, `candidates`, and `tied_queries`."""
        return {f"recall@{k}": self.recall(k) for k in recall_at} | {
            "median_rank": self.rank.double().quantile(0.5).item() + 1,
            "map": self.average_precision.mean().item(),
            "candidates": self.candidates,
            "tied_queries": int((self.ties > 0).sum()),
        }


def retrieval_ranks(image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor) -> dict[str, Ranks]:
    """Rank both directions.

    A text's right answer is its one image. An image's right answers are its texts: the best one determines the rank,
    and the others do not compete with it.

    Args:
        image_embeddings: `[N, D]` unit length.
        text_embeddings: `[M, D]` unit length.
        image_of_text: `[M]` row of the image that each text describes; every image has at least one.

    Returns:
        `text_to_image` of M and `image_to_text` of N queries.

    Raises:
        DataError: an image has no text, or an embedding is not finite.
    """
    images, texts = _finite("image", image_embeddings), _finite("text", text_embeddings)
    counts = torch.bincount(image_of_text, minlength=len(images))
    if not counts.all():
        row = int((counts == 0).nonzero()[0])
        raise DataError(f"image {row} of {len(images)} has no text; leave it out or give it one")
    owned = torch.argsort(image_of_text, stable=True).split(counts.tolist())
    return {
        "text_to_image": _rank(texts, images, image_of_text[:, None].numpy()),
        "image_to_text": _rank(images, texts, [rows.numpy() for rows in owned]),
    }


def retrieval_figures(ranks: Mapping[str, Ranks], recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Figures of all directions, named like `image_to_text/recall@1`; see `Ranks.figures`."""
    return {
        f"{direction}/{name}": value
        for direction, ranks_of_direction in ranks.items()
        for name, value in ranks_of_direction.figures(recall_at).items()
    }


def classification_ranks(image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor) -> Ranks:
    """Rank the classes for each image; `recall(1)` is top-1 accuracy.

    Args:
        image_embeddings: `[N, D]` unit length.
        class_embeddings: `[C, D]` unit length.
        labels: `[N]` right class of each image.

    Raises:
        DataError: an embedding is not finite.
    """
    images, classes = _finite("image", image_embeddings), _finite("class", class_embeddings)
    return _rank(images, classes, labels[:, None].numpy())


def _finite(kind: str, embeddings: Tensor) -> Tensor:
    # Comparisons with NaN are false: a broken model would get perfect ranks.
    wrong = int((~embeddings.isfinite()).any(1).sum())
    if wrong:
        raise DataError(f"{wrong} of {len(embeddings)} {kind} embeddings are not finite; the model is broken")
    return embeddings.detach().float().cpu()


def _rank(queries: Tensor, candidates: Tensor, right: Sequence[np.ndarray] | np.ndarray) -> Ranks:
    """Ranks of queries `[Q, D]` among candidates `[C, D]`; `right` holds rows of the right candidates of each."""
    distinct, place = distinct_rows(candidates)
    rank, ties = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
    precision = np.empty(len(queries))
    for block in torch.arange(len(queries)).split(max(1, BLOCK_SCORES // len(candidates))):
        scores = (queries[block] @ distinct.T).numpy()
        if place is not None:
            scores = scores[:, place]
        # Row by row: a row stays in the processor's cache while it is compared with each right score.
        for query, row in zip(block.tolist(), scores, strict=True):
            right_scores = np.sort(row[right[query]])[::-1]
            row[right[query]] = -np.inf
            in_front = np.array([np.count_nonzero(row >= score) for score in right_scores])
            rank[query] = in_front[0]
            ties[query] = in_front[0] - np.count_nonzero(row > right_scores[0])
            hits = np.arange(1, len(right_scores) + 1)
            precision[query] = np.mean(hits / (in_front + hits))
    return Ranks(torch.from_numpy(rank), torch.from_numpy(ties), torch.from_numpy(precision), len(candidates))


def distinct_rows(embeddings: Tensor) -> tuple[Tensor, np.ndarray | None]:
    """The distinct rows of embeddings, and the index of each row among them, or None if all rows differ. Scores of the
    distinct ones are equal where the rows are, which a matrix product of all rows does not promise."""
    places: dict[bytes, int] = {}
    place = np.array([places.setdefault(hashlib.sha256(row).digest(), len(places)) for row in embeddings.numpy()])
    if len(places) == len(embeddings):
        return embeddings, None
    _, first = np.unique(place, return_index=True)
    return embeddings[torch.from_numpy(first)], place
