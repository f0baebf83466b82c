"""The whole way on this machine: synthetic scenes, a small base CLIP, fine-tuning, benchmark, registry, index, search.

Runs the other entries one after the other on one local Ray, with MLflow on SQLite, all below one directory. Steps that
were done before with the same settings are not done again. Ends with the table of retrieval before and after and,
unless serve=false, with a running search page.

    python pipelines/demo.py
    python pipelines/demo.py --set serve=false --set output=/tmp/demo
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from pydantic import PositiveInt

from pipelines import benchmark, embed, finetune, register, sample_data, summarize
from pipelines.common.cluster import connect
from pipelines.common.entry import run_entry
from pipelines.common.settings import Settings, load_settings
from pipelines.common.storage import storage_path
from pipelines.experiments.steps import Step, run_step, serve
from pipelines.registry.server import tracking_uri

CPUS = 4


class DemoSettings(Settings):
    """Everything that defines a demo."""

    output: str = "var/demo"
    """Local directory that everything is written to."""
    train_rows: PositiveInt = 5000
    """Synthetic scenes to train on."""
    test_rows: PositiveInt = 500
    """Synthetic scenes to search; every four of them differ only behind token 77 of their captions."""
    serve: bool = True
    """End with a running search page."""
    port: PositiveInt = 8000
    """Port of the search page, on the loopback interface."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(DemoSettings, __doc__ or "", argv)
    started = time.monotonic()
    directory = Path(storage_path("output", settings.output))
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri(directory)
    connect(CPUS)
    steps = demo_steps(settings, directory)
    for number, step in enumerate(steps, start=1):
        run_step(f"[{number}/{len(steps)}]", step, directory)
    print(f"\nSynthetic scenes, {settings.test_rows} held out, before and after:\n")
    print((directory / "benchmark" / benchmark.REPORT).read_text())
    print(f"demo: {len(steps)} steps, {time.monotonic() - started:.0f} s; everything is in {directory}", flush=True)
    if settings.serve:
        serve(directory, settings.port, ray.get_runtime_context().gcs_address)


def demo_steps(settings: DemoSettings, directory: Path) -> list[Step]:
    """The entries of the demo with their settings, in order."""
    train, test = directory / "scenes-train", directory / "scenes-test"
    summarized, bench = directory / "summarized", directory / "benchmark"
    base, checkpoint = directory / "base" / "checkpoint", directory / "finetuned" / "checkpoint"
    models = f"{{base: {base}, finetuned: {checkpoint}}}"
    texts = {"long": "caption", "short": "short_caption"}
    tasks = ", ".join(f"{k}: {{input: {test}, text: {k}, source: {{caption: {c}}}}}" for k, c in texts.items())
    return [
        Step("draw scenes to train on", sample_data, rows=settings.train_rows, output=train),
        Step("draw scenes to search", sample_data, rows=settings.test_rows, group_size=4, seed=1, output=test),
        Step("train a base CLIP on short captions", finetune, "demo_base", input=train, output=base.parent),
        Step("summarize the long captions", summarize, input=train, output=summarized, overwrite="true"),
        Step(
            "stretch to 248 tokens and fine-tune",
            finetune,
            "demo_finetune",
            input=summarized,
            model__base=base,
            output=checkpoint.parent,
        ),
        Step("benchmark", benchmark, tasks=f"{{{tasks}}}", models=models, output=bench),
        Step("register", register, checkpoint=checkpoint, results=bench / benchmark.RESULTS, alias="champion"),
        Step("embed and index the scenes", embed, input=test, model=checkpoint, output=directory / "index"),
    ]


if __name__ == "__main__":
    run_entry(main)
