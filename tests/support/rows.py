"""Rows of a small Parquet, and rows that a job refuses."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.pictures import picture


def write_rows(path: Path, rows: int = 12, broken: tuple[int, ...] = (), **changes: object) -> Path:
    """A Parquet of small pictures; the images of `broken` rows are cut short."""
    images = [picture(number) for number in range(rows)]
    columns: dict[str, object] = {
        "id": [f"row-{number:03d}" for number in range(rows)],
        "image": [image[:60] if number in broken else image for number, image in enumerate(images)],
        "caption": [f"A first sentence. Picture number {number} is here. It has many dots." for number in range(rows)],
        "summary": [f"picture {number}" for number in range(rows)],
    }
    columns |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    return path


class Refused:
    """Stands for the quarantine actor: no cluster is needed to see what is refused."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.add = self

    def remote(self, reasons: dict[str, str]) -> None:
        self.reasons |= reasons
