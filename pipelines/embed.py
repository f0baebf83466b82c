"""Embed the images and captions of a Parquet into an index, and publish it for search.

    python pipelines/embed.py --set input=/data/corpus --set model=/data/run1/checkpoint --set output=/data/index
    python pipelines/embed.py --set input=s3://b/corpus --set model=models:/longclip@champion \\
        --set output=s3://b/index --set metadata=[place,year]
    python pipelines/embed.py --set model=... --set output=/data/index --set delete=[id1,id2]

An index is a Lance table of all items with their vectors, and published versions of that table that never change. Only
items that are new, that changed, or that another model embedded are embedded. A run that was killed resumes after its
last commit. Serving uses the newest version made with the model that it serves.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.indexing.settings import EmbedSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(EmbedSettings, __doc__ or "", argv)
    from pipelines.indexing.job import embed  # imports Ray and torch, which --help does not need

    embed(settings)


if __name__ == "__main__":
    run_entry(main)
