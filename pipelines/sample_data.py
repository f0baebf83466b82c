"""Draw synthetic scenes with long paragraphs and short captions into Parquet.

    python pipelines/sample_data.py --set rows=10000 --set output=var/scenes/train
    python pipelines/sample_data.py --set rows=500 --set group_size=4 --set seed=1 --set output=var/scenes/test

Each row has `id`, `image` (PNG), `caption` (100 to 245 CLIP tokens), `short_caption` and `group`. With group_size above
1, the captions of the scenes in a group differ only after token 77.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import PositiveInt
from upath import UPath

from longclip.files import whole_directory
from pipelines.common.entry import run_entry
from pipelines.common.progress import Progress
from pipelines.common.run_directory import refuse_other_output
from pipelines.common.settings import Settings, dump, load_settings
from pipelines.common.storage import local_path

JOB = "sample_data"


class SampleDataSettings(Settings):
    """All settings of the job."""

    rows: PositiveInt = 1000
    """Number of scenes."""
    output: str = "var/scenes"
    """Local directory for the Parquet files; one that this job made before is replaced."""
    seed: int = 0
    """Random seed; the same seed gives the same scenes."""
    group_size: PositiveInt = 1
    """Number of scenes that share their first two things and the words about them."""
    rows_per_file: PositiveInt = 512
    """Rows per output file."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the program's name."""
    settings = load_settings(SampleDataSettings, __doc__ or "", argv)
    import ray  # takes a second, which --help does not need

    from pipelines.common.cluster import connect
    from pipelines.common.parquet_set import MANIFEST
    from pipelines.data.scene_rows import scene_rows

    progress = Progress(JOB)
    output = local_path("output", settings.output)
    refuse_other_output("output", output, _is_own)
    connect(min_cpus=2)
    draw = partial(scene_rows, seed=settings.seed, group_size=settings.group_size)
    blocks = -(-settings.rows // settings.rows_per_file)
    dataset = ray.data.range(settings.rows, override_num_blocks=blocks).map_batches(draw, batch_size=64)
    with whole_directory(output) as directory:
        dataset.write_parquet(str(directory), min_rows_per_file=settings.rows_per_file, row_group_size=128)
        identity = {"job": JOB, "settings": dump(settings)}
        (directory / MANIFEST).write_text(json.dumps({"identity": identity}, indent=2) + "\n")
    progress.summary(settings.rows, settings.rows, 0, f"synthetic scenes in {output}")


def _is_own(directory: Path) -> bool:
    from pipelines.common.parquet_set import manifest_of  # imports Ray

    return manifest_of(UPath(directory)).get("identity", {}).get("job") == JOB


if __name__ == "__main__":
    run_entry(main)
