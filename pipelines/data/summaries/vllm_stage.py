"""The stage of `summarize.py` in front of the others, where engines that Ray Data runs write the summaries (vLLM).

Rows of all pieces flow through the engines in one stream; a piece is finished, and not generated again by a rerun, when
all its texts have come back.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.parquet as pq
import ray
from ray.data import Dataset
from upath import UPath

from longclip.errors import DataError
from longclip.text.sentences import caption_text
from pipelines.common.entry import Progress
from pipelines.common.parquet_set import ROWS_PER_GROUP
from pipelines.common.storage import Storage, arrow_filesystem, open_path
from pipelines.common.whole_files import write_whole
from pipelines.data.work_units import MAX_BLOCKS, finished_results
from pipelines.data.workspace import Workspace

STAGE = "generate"


def generate(
    work: Workspace,
    plan: Sequence[dict[str, Any]],
    column: str,
    storage: Storage,
    progress: Progress,
    summaries: Callable[[Dataset], Dataset],
) -> None:
    """Generate a text for every caption of the pieces that have none yet.

    Args:
        work: workspace of the output; texts are kept there, one file for each piece.
        plan: pieces of the input.
        column: its caption column.
        storage: how object storage is reached.
        progress: prints how far it is.
        summaries: rows of `key` and `caption` -> rows of `key` and `summary`, in any order.
    """
    folder = work.folder(STAGE)
    finished = finished_results(folder)
    pending = [number for number in range(len(plan)) if number not in finished]
    if not pending:
        return
    pieces = [{"number": number, **plan[number]} for number in pending]
    rows = ray.data.from_items(pieces, override_num_blocks=min(len(pieces), MAX_BLOCKS)).flat_map(
        ReadCaptions(column, storage)
    )
    waiting: dict[int, dict[int, str]] = defaultdict(dict)
    done = len(plan) - len(pending)
    for row in summaries(rows).iter_rows():
        number, place = map(int, row["key"].split(":"))
        waiting[number][place] = row["summary"]
        if len(waiting[number]) == plan[number]["rows"]:
            texts = waiting.pop(number)
            write_whole(folder / f"{number:06d}.json", json.dumps([texts[at] for at in range(len(texts))]).encode())
            done += 1
            work.lease.check()
            progress.show(STAGE, done, len(plan), sum(piece["rows"] for piece in plan[:done]), 0)
    if waiting or done < len(plan):
        raise DataError(f"{len(plan) - done} pieces came back from the engines with rows missing; run the job again")


class ReadCaptions:
    """Gives the captions of a piece, each with the key `piece:place`."""

    def __init__(self, column: str, storage: Storage) -> None:
        self.column, self.storage = column, storage

    def __call__(self, piece: dict[str, Any]) -> list[dict[str, str]]:
        """All rows of the piece; those without a caption have an empty one."""
        path = open_path("input", piece["file"], self.storage)
        groups = list(range(piece["first"], piece["first"] + piece["count"]))
        with pq.ParquetFile(path.path, filesystem=arrow_filesystem(path)) as file:
            batches = file.iter_batches(ROWS_PER_GROUP, row_groups=groups, columns=[self.column])
            cells = [cell for batch in batches for cell in batch.column(0).to_pylist()]
        return [
            {"key": f"{piece['number']}:{place}", "caption": caption_text(cell)} for place, cell in enumerate(cells)
        ]


def generated_texts(folder: UPath, number: int) -> list[str]:
    """Texts of a piece, in the order of its rows."""
    return json.loads((folder / f"{number:06d}.json").read_bytes())
