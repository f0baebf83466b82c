"""Score how well texts describe their images, and keep the pairs that fit best.

    python pipelines/score.py --set input=/data/clean --set model=/data/run1/checkpoint --set output=/data/scored
    python pipelines/score.py --set input=s3://b/clean --set model=models:/longclip@champion \\
        --set output=s3://b/best --set keep_share=0.8

The score is the cosine similarity of image and text, or with `measure=clipscore` 2.5 * max(cosine, 0), as the CLIPScore
paper (arXiv 2104.08718) defines it. Texts are read up to the context length of the model: a Long-CLIP scores all of a
long caption, where a score by CLIP ends at 77 tokens. Texts that are longer still are counted. A row whose caption is a
list gets a list of scores, and is kept or left out by their mean. To resume a job that was killed, run the same command
again.

Output: the files and columns of the input, with `clip_score`, and `summary_clip_score` if there are summaries;
_manifest.json, _quarantine.parquet and _report.html with a histogram.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.data.scores.settings import ScoreSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the program's name."""
    settings = load_settings(ScoreSettings, __doc__ or "", argv)
    from pipelines.data.scores.scoring import score  # imports Ray and torch, which --help does not need

    score(settings)


if __name__ == "__main__":
    run_entry(main)
