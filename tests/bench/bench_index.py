"""Searching an index: recall of texts, latency, time to build and size, against two rivals over the same vectors.

    ours    a published shard: FAISS IVF with 8-bit vectors names candidates, which are compared exactly
    hnsw    the rival FAISS HNSW (32 links, breadth 128 while building), at the first breadth at which it finds enough
    brute   the rival that compares all of them

Vectors are drawn in clusters, as embeddings lie. Queries are moved off them, as texts are off images. With --index they
are the images of an index that embed.py published, and captions of it. Lists and breadth are chosen with one half of
the queries (recall@10 of 0.95), and all are measured with the other, one query at a time.

    python tests/bench/bench_index.py [--quick] [--rows 1000000 | --index DIRECTORY]

The last line is JSON; `ratio` is the median time of brute force over that of ours. What ours finds with all of its
lists must be what brute force finds, else exit code 1.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from harness import arguments, report
from longclip.index import version_directory, version_manifests
from longclip.index.shard import Shard, write_shard

DIM, QUERIES, TOP_K, RECALL = 512, 400, 10, 0.95
BREADTHS = (32, 64, 128, 256, 512, 1024)
BLOCK = 50_000


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scaled to unit length."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def draw(rows: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of images `[rows, DIM]`, and of texts that lie off them."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(max(64, rows // 500), DIM)).astype(np.float32)
    images = np.empty((rows, DIM), np.float32)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        noise = random.standard_normal((count, DIM), np.float32)
        images[start : start + count] = unit(centres[random.integers(len(centres), size=count)] + 0.9 * noise)
    gap = unit(random.normal(size=(1, DIM)))
    near = images[random.integers(rows, size=queries)]
    texts = unit(near + 0.8 * unit(random.normal(size=(queries, DIM))) + 0.8 * gap)
    return images, texts


def embedded(index: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the images of the newest version of an index, and of some of its captions."""
    version = version_directory(index, version_manifests(index)[-1].version)
    images, texts = (
        np.concatenate([np.load(path) for path in sorted(version.glob(f"*/{target}.npy"))])
        for target in ("image", "caption")
    )
    return images, texts[np.random.default_rng(0).choice(len(texts), QUERIES, replace=False)]


def recall(found: list[np.ndarray], best: list[np.ndarray]) -> float:
    """Share of the truly best that were found."""
    return float(np.mean([len(np.intersect1d(one, other)) / TOP_K for one, other in zip(found, best, strict=True)]))


def one_by_one(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Rows found for each query, and milliseconds."""
    found, milliseconds = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query[None]))
        milliseconds.append(1000 * (time.perf_counter() - start))
    return found, milliseconds


def main() -> None:
    """Measure, compare, report."""
    options = arguments(
        __doc__,
        rows={"type": int, "default": 200_000, "help": "vectors that are drawn; 20,000 with --quick"},
        index={"type": Path, "help": "index whose vectors are taken instead"},
    )
    drawn = (20_000, 100) if options.quick else (options.rows, QUERIES)
    images, texts = embedded(options.index) if options.index else draw(*drawn)
    rows, dim = images.shape
    chosen_by, measured_by = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    items = pa.table({"id": [str(row) for row in range(rows)], "caption": [""] * rows, "thumbnail": [b""] * rows})
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        lists = int(4 * rows**0.5)
        entry = write_shard(Path(directory), [(items, {"image": images})], rows, lists)
        seconds = {"ours": time.perf_counter() - start}
        shard = Shard.open(Path(directory), entry, dim)
        megabytes = {"ours": (Path(directory) / "image.faiss").stat().st_size / 1e6}

        def ours(query: np.ndarray, probes: int | None) -> np.ndarray:
            return shard.search(query, "image", TOP_K, probes=probes).rows[0]

        best_chosen, _ = one_by_one(partial(ours, probes=None), chosen_by)
        whole, _ = one_by_one(partial(ours, probes=lists), chosen_by[:20])
        if recall(whole, best_chosen[:20]) < 1:
            sys.exit("error: with all of its lists, ours does not find what brute force finds")
        for probes in (1 << power for power in range(lists.bit_length() + 1)):
            found, _ = one_by_one(partial(ours, probes=probes), chosen_by)
            print(f"ours, {probes} lists: recall {recall(found, best_chosen):.3f}", flush=True)
            if recall(found, best_chosen) >= RECALL:
                break

        start = time.perf_counter()
        hnsw = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        hnsw.hnsw.efConstruction = 128
        hnsw.add(images)
        seconds["hnsw"] = time.perf_counter() - start
        megabytes["hnsw"] = rows * (4 * dim + 4 * 64 + 8) / 1e6
        for breadth in BREADTHS:
            hnsw.hnsw.efSearch = breadth
            found, _ = one_by_one(lambda query: hnsw.search(query, TOP_K)[1][0], chosen_by)
            print(f"hnsw, breadth {breadth}: recall {recall(found, best_chosen):.3f}", flush=True)
            if recall(found, best_chosen) >= RECALL:
                break

        best, times = one_by_one(partial(ours, probes=None), measured_by)
        figures = {"brute": {"recall": 1.0, "p50_ms": round(statistics.median(times), 2)}}
        rivals: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "ours": partial(ours, probes=probes),
            "hnsw": lambda query: hnsw.search(query, TOP_K)[1][0],
        }
        for name, search in rivals.items():
            found, times = one_by_one(search, measured_by)
            figures[name] = {"recall": round(recall(found, best), 3), "p50_ms": round(statistics.median(times), 2)}
            figures[name] |= {"build_s": round(seconds[name], 1), "structure_mb": round(megabytes[name], 1)}
    report(
        "index",
        options.quick,
        ratio=round(figures["brute"]["p50_ms"] / figures["ours"]["p50_ms"], 1),
        rows=rows,
        dim=dim,
        lists=lists,
        probes=probes,
        breadth=breadth,
        **figures,
    )


if __name__ == "__main__":
    main()
