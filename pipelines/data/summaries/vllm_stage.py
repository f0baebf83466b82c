"""The first stage of `summarize.py` for strategy vllm: Ray Data runs the engines that write the summaries.

The rows of all pieces pass through the engines in one stream. A piece is finished, and skipped by a rerun, when all its
texts are stored.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.data import Dataset
from upath import UPath

from longclip.errors import DataError
from pipelines.common.parquet_rows import Damaged, read_cells, read_rows
from pipelines.common.parquet_set import ROWS_PER_GROUP
from pipelines.common.progress import Progress
from pipelines.common.storage import Storage, explained, open_path
from pipelines.common.whole_files import write_whole
from pipelines.data.summaries.captions import row_caption
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
    """Generate a summary of every caption in the unfinished pieces.

    Args:
        work: workspace of the output; it stores the texts in one file per piece.
        plan: pieces of the input.
        column: its caption column.
        storage: access to object storage.
        progress: reports finished pieces.
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
    received: dict[int, dict[int, str]] = defaultdict(dict)
    done = len(plan) - len(pending)
    for row in summaries(rows).iter_rows():
        number, row_number = map(int, row["key"].split(":"))
        received[number][row_number] = row["summary"]
        if len(received[number]) == plan[number]["rows"]:
            by_row = received.pop(number)
            texts = [by_row[index] for index in range(len(by_row))]
            write_whole(folder / f"{number:06d}.json", json.dumps(texts).encode())
            done += 1
            work.lease.check()
            progress.show(STAGE, done, len(plan), sum(piece["rows"] for piece in plan[:done]), 0)
    if received or done < len(plan):
        raise DataError(
            f"{len(plan) - done} pieces are incomplete because the engines lost rows; run the same command again"
        )


class ReadCaptions:
    """Reads the captions of a piece, each with the key `piece:row`."""

    def __init__(self, column: str, storage: Storage) -> None:
        self.column, self.storage = column, storage

    def __call__(self, piece: dict[str, Any]) -> list[dict[str, str]]:
        """All rows of the piece; a missing or unreadable caption is an empty text."""
        texts: list[str] = []
        with explained("input", piece["file"]):
            path = open_path("input", piece["file"], self.storage)
            for part in read_rows(path, piece["first"], piece["rows"], ROWS_PER_GROUP, [self.column]):
                if isinstance(part, Damaged):
                    texts += [""] * part.rows
                else:
                    texts += [row_caption(row[self.column])[0] for row in read_cells(part)[0]]
        return [{"key": f"{piece['number']}:{row}", "caption": text} for row, text in enumerate(texts)]


def generated_texts(folder: UPath, number: int) -> list[str]:
    """Texts of a piece, in the order of its rows."""
    return json.loads((folder / f"{number:06d}.json").read_bytes())
