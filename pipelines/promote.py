"""Make the candidate the champion if it is better on the same tasks, compared query by query.

    python pipelines/promote.py --set tasks.urban1k.input=/data/Urban1k --set tasks.coco5k.input=/data/coco \\
        --set tasks.cifar10.input=/data/cifar-10-binary.tar.gz

On tasks of long text the candidate must have at least as many hits at 1 as the champion. On short text and zero-shot
the 95 % interval of the paired difference must be above -`margin`, so a data set too small to show that lets no
candidate pass. If all gates hold, the alias is moved. The comparison is logged to an MLflow run in any case. Without a
champion, the candidate becomes it.

A second run has nothing to do. Of two concurrent runs, one moves the alias and the other fails. Exit code 6 means that
the champion is unchanged. `rollback.py` undoes a promotion.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.evaluation.settings import PromoteSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(PromoteSettings, __doc__ or "", argv)
    from pipelines.evaluation.promotion import promote  # imports Ray and torch, which --help does not need

    promote(settings)


if __name__ == "__main__":
    run_entry(main)
