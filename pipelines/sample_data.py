"""Draw synthetic scenes with long paragraphs and short captions into Parquet, as many as wanted.

Each row has `id`, `image` (PNG), `caption` (100 to 245 CLIP tokens), `short_caption` and `group`. With group_size above
1, scenes of a group can be told apart only by what their caption says after token 77. All of it is synthetic.

    python pipelines/sample_data.py --set rows=10000 --set output=var/scenes/train
    python pipelines/sample_data.py --set rows=500 --set group_size=4 --set seed=1 --set output=var/scenes/test
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import ray
from pydantic import PositiveInt

from longclip.files import whole_directory
from longclip.tokenizer import load_tokenizer
from pipelines.common.entry import Progress, connect, run_entry
from pipelines.common.settings import Settings, load_settings
from pipelines.common.storage import storage_path
from pipelines.data.scenes import draw_scene, render_scene

CONTEXT_LENGTH = 248


class SampleDataSettings(Settings):
    """Everything that defines a sample."""

    rows: PositiveInt = 1000
    """Scenes to draw."""
    output: str = "var/scenes"
    """Local directory of Parquet files; replaced if it exists."""
    seed: int = 0
    """Seed of the series; the same seed gives the same scenes."""
    group_size: PositiveInt = 1
    """Scenes that share their first two things and the words about them."""
    rows_per_file: PositiveInt = 512
    """Rows of a file."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(SampleDataSettings, __doc__ or "", argv)
    progress = Progress("sample_data")
    output = storage_path("output", settings.output)
    connect(min_cpus=2)
    draw = partial(draw_rows, seed=settings.seed, group_size=settings.group_size)
    blocks = -(-settings.rows // settings.rows_per_file)
    dataset = ray.data.range(settings.rows, override_num_blocks=blocks).map_batches(draw, batch_size=64)
    with whole_directory(output) as aside:
        dataset.write_parquet(str(aside), min_rows_per_file=settings.rows_per_file, row_group_size=128)
    progress.summary(settings.rows, settings.rows, 0, f"synthetic scenes in {output}")


def draw_rows(batch: dict[str, np.ndarray], seed: int, group_size: int) -> dict[str, list[object]]:
    """Rows of the scenes whose numbers stand in `batch["id"]`."""
    tokenizer = load_tokenizer(None, CONTEXT_LENGTH)
    numbers = [int(number) for number in batch["id"]]
    encode = tokenizer.backend_tokenizer.encode  # one text at a time: ten times faster than the whole tokenizer's call
    scenes = [draw_scene(seed, number, group_size, lambda text: len(encode(text).ids)) for number in numbers]
    return {
        "id": [f"synthetic-scene-{seed}-{group_size}-{number:07d}" for number in numbers],
        "image": [render_scene(scene) for scene in scenes],
        "caption": [scene.caption for scene in scenes],
        "short_caption": [scene.short_caption for scene in scenes],
        "group": [scene.group for scene in scenes],
    }


if __name__ == "__main__":
    run_entry(main)
