"""Retrieval metrics of both directions: `longclip.retrieval_ranks` against numpy's argsort.

The rival is the plain implementation: one matrix of all scores, `argsort` of its rows and of its columns, and the place
of each right candidate. Both get the same random unit features of width 512, several captions an image. First both are
compared at 500 x 2500: the ranks must be equal, else exit code 1. Each runs in a process of its own, so that its peak
of memory is its own.

    python tests/bench/bench_metrics.py [--quick] [--large]

Normal size is 5,000 images x 25,000 texts (COCO); `--large` is 31,000 x 155,000 (the full Flickr30k), where the rival
would need 38 GB for its scores alone and twice that for an argsort: it then sorts blocks of 1,000 rows, as few would
write it. The last line is JSON; `ratio` is the rival's wall-clock time over ours.
"""

import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch.nn.functional import normalize

from harness import arguments, report
from longclip.evaluation.metrics import retrieval_ranks

WIDTH, CAPTIONS = 512, 5
Places = tuple[np.ndarray, np.ndarray]
"""Ranks of texts and of images."""


def case(images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image and text embeddings, and the image of each text."""
    draw = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(images).repeat_interleave(CAPTIONS)
    features = torch.randn(images, WIDTH, generator=draw)
    texts = torch.randn(len(image_of_text), WIDTH, generator=draw).mul_(5).add_(features[image_of_text])
    return normalize(features, dim=1), normalize(texts, dim=1), image_of_text


def ours(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor) -> Places:
    """The library."""
    ranks = retrieval_ranks(images, texts, image_of_text)
    return ranks["text_to_image"].rank.numpy(), ranks["image_to_text"].rank.numpy()


def by_argsort(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor, rows: int = 1 << 40) -> Places:
    """The rival, `rows` queries at a time."""
    image, text, owner = images.numpy(), texts.numpy(), image_of_text.numpy()
    of_texts, of_images = [], []
    for start in range(0, len(text), rows):
        order = np.argsort(-(text[start : start + rows] @ image.T), axis=1)
        of_texts.append(np.argmax(order == owner[start : start + rows, None], axis=1))
    for start in range(0, len(image), rows):
        order = np.argsort(-(image[start : start + rows] @ text.T), axis=1)
        mine = owner[order] == np.arange(start, min(start + rows, len(image)))[:, None]
        of_images.append(np.argmax(mine, axis=1))
    return np.concatenate(of_texts), np.concatenate(of_images)


def measure(way: str, images: int, rows: int) -> tuple[float, float]:
    """Seconds, and the peak of memory in GiB beyond the features, in a fresh process."""
    features = case(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if way == "ours":
        ours(*features)
    else:
        by_argsort(*features, rows)
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def main() -> None:
    """Compare, measure, report."""
    large = {"action": "store_true", "help": "31,000 images x 155,000 texts; minutes"}
    options = arguments(__doc__, large=large)
    small = case(500)
    for found, expected in zip(ours(*small), by_argsort(*small), strict=True):
        if (found != expected).any():
            sys.exit(f"error: {(found != expected).sum()} of {len(found)} ranks differ from the rival's")
    images = 31_000 if options.large else 1_000 if options.quick else 5_000
    rows = 1_000 if options.large else 1 << 40
    taken: dict[str, list[tuple[float, float]]] = {"argsort": [], "ours": []}
    for _ in range(1 if options.quick or options.large else 3):
        for way, results in taken.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                results.append(alone.submit(measure, way, images, rows).result())
            print(f"{way}: {results[-1][0]:.1f} s, {results[-1][1]:.2f} GiB", flush=True)
    seconds = {way: statistics.median(second for second, _ in results) for way, results in taken.items()}
    memory = {way: round(max(gigabytes for _, gigabytes in results), 2) for way, results in taken.items()}
    report(
        "metrics",
        options.quick,
        ratio=round(seconds["argsort"] / seconds["ours"], 2),
        images=images,
        texts=images * CAPTIONS,
        seconds={way: round(value, 2) for way, value in seconds.items()},
        peak_gib=memory,
    )


if __name__ == "__main__":
    main()
