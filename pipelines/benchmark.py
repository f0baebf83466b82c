"""Measure retrieval in both directions, for one or several checkpoints, and compare them.

Recall at 1, 5 and 10 of every text column. A cell may hold one caption or a list of them: image-to-text then counts any
of them. Each checkpoint reads as many tokens as it has positions, so plain CLIP is cut at 77.

    python pipelines/benchmark.py --set data=/data/test --set 'texts=[caption, short_caption]' \\
        --set 'models={base: openai/clip-vit-base-patch16, finetuned: /data/run1/checkpoint}' --set output=/data/bench
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pydantic import Field

from longclip.checkpoint import load_checkpoint
from longclip.files import whole_directory
from longclip.metrics import RECALL_AT, retrieval_figures, retrieval_ranks
from pipelines.embedding import EmbeddingSettings, embed_dataset
from pipelines.entry import Progress, connect, run_entry
from pipelines.parquet_files import open_parquet
from pipelines.records import start_quarantine, write_quarantine
from pipelines.settings import dump, load_settings, storage_path

RESULTS, TABLE = "results.json", "table.md"


class BenchmarkSettings(EmbeddingSettings):
    """Everything that defines a measurement."""

    models: dict[str, str] = Field(min_length=1)
    """Checkpoints by the name they get in the table: directories or hub names."""
    texts: list[str] = Field(default=["caption"], min_length=1)
    """Text columns to measure, each by itself."""
    output: str = "var/benchmark"
    """Local directory for results.json and table.md; replaced if it exists."""
    max_rejected_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of rows that may be unusable. 0 by default: fewer candidates would flatter the figures."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(BenchmarkSettings, __doc__ or "", argv)
    progress = Progress("benchmark")
    results: dict[str, dict[str, Any]] = {}
    rejected: dict[str, str] = {}
    for name, source in settings.models.items():
        print(f"embedding with {name} ({source})", flush=True)
        results[name], rows, reasons = measure(settings, source)
        rejected |= reasons
    table = markdown_table(results, settings.texts)
    output = Path(storage_path("output", settings.output))
    with whole_directory(output) as aside:
        (aside / RESULTS).write_text(json.dumps({"settings": dump(settings), "results": results}, indent=2) + "\n")
        (aside / TABLE).write_text(table + "\n")
        write_quarantine(rejected, settings.data, "benchmark", aside / "quarantine.parquet")
    print(f"\n{table}\n")
    progress.summary(rows, rows - len(rejected), len(rejected), f"results in {output}")


def measure(settings: BenchmarkSettings, source: str) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Figures of one checkpoint (`images`, `<column>/<direction>/recall@k`, ...), rows, and rejected rows."""
    checkpoint = load_checkpoint(source)
    needed = [settings.columns.id, settings.columns.image, *settings.texts]
    data = open_parquet("data", settings.data, settings.storage, needed)
    connect(settings.workers + 2)
    quarantine = start_quarantine(data.rows, settings.max_rejected_fraction)
    embedded = embed_dataset(
        data.dataset(needed),
        checkpoint,
        source,
        settings.columns,
        quarantine,
        texts=settings.texts,
        workers=settings.workers,
        use_gpu=settings.use_gpu,
    ).take_all()
    images = torch.from_numpy(np.stack([row["image_embedding"] for row in embedded]))
    figures: dict[str, Any] = {"context_length": checkpoint.context_length, "images": len(images)}
    for column in settings.texts:
        parts = [row[f"{column}_embedding"] for row in embedded]
        image_of_text = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
        texts = torch.from_numpy(np.concatenate(parts))
        figures[f"{column}/texts"] = len(texts)
        found = retrieval_figures(retrieval_ranks(images, texts, image_of_text))
        figures |= {f"{column}/{name}": value for name, value in found.items()}
    return figures, data.rows, ray.get(quarantine.reasons.remote())


def markdown_table(results: dict[str, dict[str, Any]], texts: list[str]) -> str:
    """A Markdown table of recall in percent: one line per text column and checkpoint."""
    heads = [f"{direction} R@{k}" for direction in ("T2I", "I2T") for k in RECALL_AT]
    lines = ["| texts | model | tokens read | " + " | ".join(heads) + " |", "|---|---|---:|" + "---:|" * len(heads)]
    for column in texts:
        for name, figures in results.items():
            directions = ("text_to_image", "image_to_text")
            recall = [figures[f"{column}/{direction}/recall@{k}"] for direction in directions for k in RECALL_AT]
            cells = " | ".join(f"{100 * value:.1f}" for value in recall)
            lines.append(f"| {column} | {name} | {figures['context_length']} | {cells} |")
    counts = next(iter(results.values()))
    candidates = ", ".join(f"{counts[f'{column}/texts']} texts of {column}" for column in texts)
    return "\n".join([*lines, "", f"Candidates: {counts['images']} images; {candidates}. Recall in percent."])


if __name__ == "__main__":
    run_entry(main)
