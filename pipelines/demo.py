"""Run every stage on this machine: synthetic scenes, training, benchmark, registry, index, and a search page.

    python pipelines/demo.py
    python pipelines/demo.py --set serve=false --set output=/tmp/demo

Trains a small base CLIP on short captions and fine-tunes it on long ones. Runs the other entries one after the other on
one local Ray, with MLflow on SQLite and all files in one directory. Steps that are complete with the same settings are
skipped. Prints retrieval before and after fine-tuning and, unless serve=false, serves the search page.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import PositiveInt

from pipelines import benchmark, embed, finetune, register, sample_data, summarize
from pipelines.common.entry import run_entry
from pipelines.common.settings import Settings, load_settings
from pipelines.common.storage import local_path
from pipelines.experiments.steps import Step, run_step, serve

CPUS = 4


class DemoSettings(Settings):
    """Settings of the demo."""

    output: str = "var/demo"
    """Local directory for all files."""
    train_rows: PositiveInt = 5000
    """Number of synthetic scenes for training."""
    test_rows: PositiveInt = 500
    """Number of synthetic scenes for testing, in groups of four whose captions differ only after token 77."""
    serve: bool = True
    """Serve the search page at the end."""
    port: PositiveInt = 8000
    """Port of the search page, on the loopback interface."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(DemoSettings, __doc__ or "", argv)
    import ray  # takes seconds with the next ones, and --help does not need them

    from pipelines.common.cluster import connect
    from pipelines.registry.server import tracking_uri

    started = time.monotonic()
    directory = local_path("output", settings.output)
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri(directory)
    connect(CPUS)
    steps = demo_steps(settings, directory)
    for number, step in enumerate(steps, start=1):
        run_step(f"[{number}/{len(steps)}]", step, directory)
    print(f"\nSynthetic scenes, {settings.test_rows} held out, before and after:\n")
    print((directory / "benchmark" / "report.md").read_text())
    print(f"demo: {len(steps)} steps, {time.monotonic() - started:.0f} s; all files are in {directory}", flush=True)
    if settings.serve:
        serve(directory, settings.port, ray.get_runtime_context().gcs_address)


def demo_steps(settings: DemoSettings, directory: Path) -> list[Step]:
    """The entries of the demo with their settings, in order."""
    train, test = directory / "scenes-train", directory / "scenes-test"
    summarized, bench = directory / "summarized", directory / "benchmark"
    base, checkpoint = directory / "base" / "checkpoint", directory / "finetuned" / "checkpoint"
    models = {"base": str(base), "finetuned": str(checkpoint)}
    texts = {"long": "caption", "short": "short_caption"}
    tasks = {k: {"input": str(test), "text": k, "source": {"caption": column}} for k, column in texts.items()}
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
        Step("benchmark", benchmark, tasks=tasks, models=models, perturbation_draws=1, output=bench),
        Step("register", register, checkpoint=checkpoint, results=bench / "results.json", alias="champion"),
        Step("embed and index the scenes", embed, input=test, model=checkpoint, output=directory / "index"),
    ]


if __name__ == "__main__":
    run_entry(main)
