"""Retrieval metrics: recall at k in both directions, with any number of captions per image."""

from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
_CHUNK = 1024


def retrieval_ranks(image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor) -> dict[str, Tensor]:
    """Rank, from 0, of the right answer of every query.

    A text's answer is its one image. An image's answer is any of its texts: the best placed one counts, and its other
    texts are no competitors. A wrong candidate with exactly the right one's score is placed in front of it: ties
    never help.

    Args:
        image_embeddings: `[N, D]` unit length.
        text_embeddings: `[M, D]` unit length.
        image_of_text: `[M]` row of the image that each text describes; every image has at least one.

    Returns:
        `text_to_image` `[M]` and `image_to_text` `[N]`, int64.
    """
    images, texts = image_embeddings.float(), text_embeddings.float()
    own_score = torch.empty(len(texts))
    text_to_image = torch.empty(len(texts), dtype=torch.int64)
    for rows in torch.arange(len(texts)).split(_CHUNK):
        scores = texts[rows] @ images.T
        own = scores.gather(1, image_of_text[rows, None])
        own_score[rows] = own[:, 0]
        text_to_image[rows] = (scores >= own).sum(1) - 1
    best_own = torch.full((len(images),), -torch.inf).scatter_reduce(0, image_of_text, own_score, "amax")
    image_to_text = torch.zeros(len(images), dtype=torch.int64)
    for rows in torch.arange(len(texts)).split(_CHUNK):
        scores = texts[rows] @ images.T
        wrong = image_of_text[rows, None] != torch.arange(len(images))
        image_to_text += ((scores >= best_own) & wrong).sum(0)
    return {"text_to_image": text_to_image, "image_to_text": image_to_text}


def retrieval_recall(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall at k of both directions, named like `image_to_text/recall@1`, as shares between 0 and 1.

    Arguments as in `retrieval_ranks`.
    """
    ranks = retrieval_ranks(image_embeddings, text_embeddings, image_of_text)
    return {
        f"{direction}/recall@{k}": (found < k).double().mean().item()
        for direction, found in ranks.items()
        for k in recall_at
    }
