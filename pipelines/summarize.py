"""Add short summaries to the captions of a Parquet.

    python pipelines/summarize.py --set input=/data/clean --set output=/data/train
    python pipelines/summarize.py --set input=/data/clean --set output=/data/train \\
        --set strategy=[extractive,drop_first]

Strategies without a model: first_sentence (as in the official code), extractive (the most central sentence), drop_first
(all but the first sentence) and random_sentences (seeded by the row's id). With a model: extractive_embedding, seq2seq,
chat, vllm, and endpoint (an OpenAI-compatible server). A summary written by a model is checked against its caption; if
it fails, it is replaced by the extractive one and counted. With several strategies each caption gets several
summaries: training samples among them, so that none becomes a shortcut. To resume a job that was killed, run the same
command again.

Output: the files and columns of the input, with `summary` and `summary_source` (lists, if there are several
strategies), _manifest.json, _quarantine.parquet and _report.html.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.data.summaries.settings import SummarizeSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the program's name."""
    settings = load_settings(SummarizeSettings, __doc__ or "", argv)
    from pipelines.data.summaries.summarization import summarize  # imports Ray and torch, which --help does not need

    summarize(settings)


if __name__ == "__main__":
    run_entry(main)
