"""Study what each part of the Long-CLIP method contributes, on models trained here.

    python pipelines/study.py --config pipelines/configs/study_reduced.yaml      # minutes
    python pipelines/study.py                                                    # an hour on one or two cores
    python pipelines/study.py --set input=/data/collages-train --set base_input=/data/photos-train \\
        --set 'tests={long: {input: /data/collages-test}, short: {input: /data/photos-val}}'

Trains one base CLIP per seed on short captions, and fine-tunes each in four ways: with plainly interpolated positions
(direct), with the knowledge-preserving stretch (kps), with primary component matching (pcm), and with both (both). The
base itself is the fifth arm (none). Then, with both, it varies the weight of the summary loss, the summaries, and the
number of components. All models answer the same long and short queries, and are compared query by query.

Without `input` it draws synthetic scenes. Everything runs in one Ray session. The same command resumes a stopped study,
and the report is written after each stage. Writes cells/NAME/ (results.json and the rank of every query) and report/
(report.md, report.json, one plot per stage).
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.experiments.study_settings import StudySettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(StudySettings, __doc__ or "", argv)
    from pipelines.experiments.study import study  # imports Ray and pyarrow, which --help does not need

    study(settings)


if __name__ == "__main__":
    run_entry(main)
