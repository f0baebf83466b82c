"""Parquet -> training batches on this machine's cores: Ray Data with `ModelInputs` against torch's DataLoader.

Rivals read the same files and give batches of 128 rows with pixels and the tokens of a caption and a summary:

    ray         the pipeline of pipelines/finetune.py
    dataloader  one worker per core, the same decoding and tokenizing
    reference   the same with the transform of the official code: Pillow, bicubic resize, float32, normalised

What starts up costs the same for any number of rows, so the rate is the slope between two sizes. First the batches are
compared, row by row: equal to the DataLoader's, within one grey level of the reference's; else exit code 1.

    python tests/bench/bench_pipeline.py [--quick]

The last line is JSON; `ratio` is ray's rate over dataloader's, `ratio_to_reference` over reference's, and
`first_batch_seconds` the time to the first batch of the larger set, in a cluster that is up.
"""

import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from harness import arguments, report
from longclip.images import ImageTransform
from longclip.tokenizer import load_tokenizer, tokenize
from photographs import photograph
from pipelines.common.cluster import connect
from pipelines.common.columns import Columns
from pipelines.common.model_inputs import ModelInputs, row_key
from pipelines.common.parquet_set import open_parquet, parquet_writer
from pipelines.common.rejected_rows import start_quarantine
from pipelines.common.storage import Storage
from pipelines.training.row_feed import POSITION, WindowReader, feed
from pipelines.training.row_order import TrainingOrder
from pipelines.training.row_source import OBJECT_STORE_SHARE
from pipelines.training.settings import DATA_CPUS, Data

SIDE, BATCH, CONTEXT_LENGTH = 224, 128, 248
COLUMNS = ["id", "image", "caption", "summary"]
FILES = 32
CORES = os.cpu_count() or 1
Batch = dict[str, Any]


def write(path: Path, rows: int) -> Path:
    """A set of photographs of 640 x 480 with long captions, in files as prepare writes them."""
    images = [photograph(640, 480, seed) for seed in range(FILES)]
    per_file = max(BATCH, rows // 8)
    path.mkdir()
    for start in range(0, rows, per_file):
        table = pa.table(
            {
                "id": [f"row-{row:06d}" for row in range(start, min(rows, start + per_file))],
                "image": [images[row % FILES] for row in range(start, min(rows, start + per_file))],
                "caption": [
                    f"Picture {row}. " + "It shows soft shapes in many colours. " * 20 for row in range(per_file)
                ],
                "summary": [f"soft shapes, number {row}" for row in range(per_file)],
            }
        )
        with parquet_writer(path / f"part-{start:06d}.parquet", table.schema) as output:
            output.add(table)
    return path


def ray_batches(path: Path) -> Iterator[Batch]:
    """What the one worker of a training run gets."""
    data = open_parquet("data", str(path), Storage(), COLUMNS)
    texts = {"caption": 1, "summary": 1}
    quarantine = start_quarantine(data.rows, 0.0)
    inputs = ModelInputs(Columns(), texts, ImageTransform(SIDE), None, CONTEXT_LENGTH, quarantine, keep=[POSITION])
    order = TrainingOrder(data.row_groups, BATCH, streams=1, window_rows=Data().shuffle_window, seed=0)
    free = ray.cluster_resources()
    memory = OBJECT_STORE_SHARE * free["object_store_memory"]
    yield from feed(
        WindowReader(data, order, inputs, COLUMNS), range(order.steps_per_epoch), BATCH, free["CPU"], memory
    )


class Rows(IterableDataset):
    """Batches of the row groups that are a worker's."""

    def __init__(self, path: Path, pixels: Callable[[bytes], Any]) -> None:
        self.files = sorted(path.glob("*.parquet"))
        self.pixels = pixels

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        groups = [(file, group) for file in self.files for group in range(pq.ParquetFile(file).num_row_groups)]
        for file, group in groups[number::workers]:
            rows = pq.ParquetFile(file).read_row_group(group, COLUMNS).to_pydict()
            batch: Batch = {
                "row_key": [row_key(row) for row in rows["id"]],
                "pixels": np.stack([self.pixels(image) for image in rows["image"]]),
            }
            for name in ("caption", "summary"):
                tokens = tokenize(load_tokenizer(None, CONTEXT_LENGTH), rows[name], CONTEXT_LENGTH)
                batch[f"{name}_ids"] = tokens.input_ids.numpy()
            yield batch


def loader_batches(pixels: Callable[[bytes], Any], path: Path) -> Iterator[Batch]:
    """A DataLoader with a worker for each core."""
    options: dict[str, Any] = {"num_workers": CORES, "multiprocessing_context": "forkserver", "batch_size": None}
    yield from DataLoader(Rows(path, pixels), prefetch_factor=2, **options)


def reference_pixels(data: bytes) -> np.ndarray:
    """CLIP's own transform: `[3, S, S]` float32, normalised."""
    transform = ImageTransform(SIDE)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = int(SIDE * image.width / short), int(SIDE * image.height / short)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    tensor = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
    return ((tensor - torch.tensor(transform.mean)[:, None, None]) / torch.tensor(transform.std)[:, None, None]).numpy()


def our_pixels(data: bytes) -> np.ndarray:
    """The transform of this library, `[S, S, 3]` uint8."""
    return ImageTransform(SIDE).pixels(data)


RIVALS: dict[str, Callable[[Path], Iterator[Batch]]] = {
    "ray": ray_batches,
    "dataloader": partial(loader_batches, our_pixels),
    "reference": partial(loader_batches, reference_pixels),
}


def compare(path: Path) -> None:
    """End the benchmark if the rivals do not give the same."""
    found: dict[str, dict[int, tuple[np.ndarray, bytes]]] = {}
    for name, batches in RIVALS.items():
        found[name] = {
            int(key): (np.asarray(pixels), np.trim_zeros(np.asarray(ids).ravel(), "b").astype(np.int32).tobytes())
            for batch in batches(path)
            for key, pixels, ids in zip(batch["row_key"], batch["pixels"], batch["caption_ids"], strict=True)
        }
    for name, rows in found.items():
        if rows.keys() != found["ray"].keys():
            sys.exit(f"error: {name} gives {len(rows)} rows, ray {len(found['ray'])}")
        for key, (pixels, ids) in rows.items():
            if name == "reference":
                mean, std = (
                    np.array(value)[:, None, None] for value in (ImageTransform(SIDE).mean, ImageTransform(SIDE).std)
                )
                pixels = np.round((pixels * std + mean) * 255).transpose(1, 2, 0)
            difference = int(np.abs(pixels.astype(int) - found["ray"][key][0].astype(int)).max())
            if ids != found["ray"][key][1] or difference > (name == "reference"):
                sys.exit(f"error: row {key} of {name} differs from ray's")


def consume(batches: Iterator[Batch], rows: int) -> tuple[float, float]:
    """Seconds to the first batch and to the last."""
    start, first, seen = time.perf_counter(), 0.0, 0
    for batch in batches:
        first = first or time.perf_counter() - start
        seen += len(batch["pixels"])
    if seen != rows:
        sys.exit(f"error: {seen} of {rows} rows came")
    return first, time.perf_counter() - start


def main() -> None:
    """Compare, measure, report."""
    quick = arguments(__doc__).quick
    sizes = (1024, 3072) if quick else (4096, 12288)
    rounds = 1 if quick else 3
    connect(max(CORES + 1, DATA_CPUS))  # as finetune does, whose workers have CPUs of their own
    # Ray's threads forbid plain forks; workers of a server that has imported everything start as fast.
    multiprocessing.set_forkserver_preload(
        ["torch", "pyarrow.parquet", "longclip.images", "longclip.tokenizer", "ray.data"]
    )
    seconds: dict[tuple[str, int], list[float]] = {}
    first: dict[str, list[float]] = {name: [] for name in RIVALS}
    with tempfile.TemporaryDirectory() as directory:
        compare(write(Path(directory) / "compare", 2 * BATCH))
        paths = {rows: write(Path(directory) / str(rows), rows) for rows in sizes}
        consume(ray_batches(paths[sizes[1]]), sizes[1])  # the cluster starts its processes and they import torch: once
        for number in range(rounds):
            for rows, path in paths.items():
                for name, batches in RIVALS.items():
                    first_batch, all_batches = consume(batches(path), rows)
                    seconds.setdefault((name, rows), []).append(all_batches)
                    if rows == sizes[1]:
                        first[name].append(first_batch)
                    print(f"round {number + 1}/{rounds}: {name} {rows} rows: {all_batches:.2f} s", flush=True)
    ray.shutdown()
    small, large = sizes
    rates = {
        name: (large - small) / (statistics.median(seconds[name, large]) - statistics.median(seconds[name, small]))
        for name in RIVALS
    }
    report(
        "pipeline",
        quick,
        ratio=round(rates["ray"] / rates["dataloader"], 3),
        ratio_to_reference=round(rates["ray"] / rates["reference"], 2),
        rows_per_second={name: round(rate) for name, rate in rates.items()},
        first_batch_seconds={name: round(statistics.median(values), 2) for name, values in first.items()},
        rows=list(sizes),
        cores=CORES,
    )


if __name__ == "__main__":
    main()
