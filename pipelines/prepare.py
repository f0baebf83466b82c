"""Turn images with captions into clean training Parquet: decode, check, hash, deduplicate, split.

    python pipelines/prepare.py --set input=/data/sharegpt4v.json --set source.images=/data --set output=/data/clean
    python pipelines/prepare.py --set input=s3://bucket/raw --set output=s3://bucket/clean --set val_fraction=0.01 \\
        --set image.short_side=288 --set exclude_overlap_with=/data/urban1k

Input: Parquet (images as bytes, Hugging Face structs, paths or URIs), WebDataset tars, img2dataset output, ShareGPT4V,
DOCCI, DCI, IIW, COCO and Flickr30k annotations, Urban1k, or any folder of images with .txt files next to them; local,
s3:// or any other fsspec URI. Unusable rows go to a quarantine file with the reason. To resume a job that was killed,
run the same command again.

Output: <output>/train/*.parquet, <output>/val/*.parquet, _manifest.json, _quarantine.parquet and _report.html.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.data.settings import PrepareSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the program's name."""
    settings = load_settings(PrepareSettings, __doc__ or "", argv)
    from pipelines.data.preparation import prepare  # imports Ray and torch, which --help does not need

    prepare(settings)


if __name__ == "__main__":
    run_entry(main)
