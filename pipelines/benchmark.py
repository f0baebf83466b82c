"""Measure and compare checkpoints on retrieval and zero-shot tasks.

    python pipelines/benchmark.py --set 'models={base: openai/clip-vit-base-patch16, tuned: /data/run1/checkpoint}' \\
        --set tasks.urban1k.input=/data/Urban1k --set tasks.cifar10.input=/data/cifar-10-binary.tar.gz \\
        --set 'tasks.mine={input: /data/test, source: {caption: caption}}' --set output=/data/bench

A task is a protocol by its name (coco5k, flickr30k-1k, flickr30k-full, sharegpt4v-1k, sharegpt4v-10k, urban1k, docci,
dci, long-dci, iiw, imagenet, imagenet-v2, imagenet-o, cifar10, cifar100, sugarcrepe, sugarcrepe-pp, fg-ovd-hard,
winoground, mmvp-vlm, himo-docci, eccv-caption; see protocols.yaml), or any data set of yours. A model is a directory, a
hub name, models:/name/version, models:/name@alias, or a file of official weights.

Writes report.html, report.md, results.json, one JSON per task, the rank of every query in ranks/, and the answer to
every question in scores/. Each model on each task is kept in measured/ when it is finished: after a kill, or with
another model or task, the same output is completed. results.json is written last.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.evaluation.settings import BenchmarkSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(BenchmarkSettings, __doc__ or "", argv)
    from pipelines.evaluation.benchmarking import benchmark  # imports Ray and torch, which --help does not need

    benchmark(settings)


if __name__ == "__main__":
    run_entry(main)
