"""Fine-tune a CLIP on long captions and their summaries, on any number of workers.

The text positions are stretched (77 -> 248), long captions are matched to the image features, and summaries to their
primary components (Long-CLIP, arXiv 2403.15378). With model.architecture the same code trains a small CLIP from
scratch. The same command resumes a run that was stopped.

    python pipelines/finetune.py --config pipelines/configs/finetune.yaml \\
        --set input=/data/train --set model.base=openai/clip-vit-base-patch16 --set output=/data/run1

    ray job submit --working-dir . -- python pipelines/finetune.py --config ... --set output=$PWD/var/run1
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.training.settings import FinetuneSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the program's name."""
    settings = load_settings(FinetuneSettings, __doc__ or "", argv)
    from pipelines.training.job import finetune  # imports Ray and torch, which --help does not need

    finetune(settings)


if __name__ == "__main__":
    run_entry(main)
