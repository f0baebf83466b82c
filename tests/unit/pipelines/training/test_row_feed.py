"""Rows for the training workers: their order, substitutes for unusable rows, several workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from longclip.errors import DataError
from longclip.images import ImageTransform
from pipelines.common.columns import Columns
from pipelines.common.model_inputs import ModelInputs, row_key
from pipelines.common.parquet_set import open_parquet
from pipelines.common.storage import Storage
from pipelines.training.row_feed import POSITION, WindowReader
from pipelines.training.row_order import TrainingOrder
from tests.support.pictures import picture
from tests.support.rows import Refused

ROWS = 60
BROKEN = (7, 8, 23)
COLUMNS = ["id", "image", "caption"]
ORDER = {"global_batch_size": 12, "streams": 4, "window_rows": 15, "seed": 1}
KEYS = {row_key(f"row-{row:02d}"): row for row in range(ROWS)}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Refused()


def write(path: Path, broken: tuple[int, ...]) -> Path:
    """Rows with lists of captions, in two files of several row groups."""
    rows = [
        {
            "id": f"row-{row:02d}",
            "image": b"no image" if row in broken else picture(row),
            "caption": [f"picture {row}", f"again {row}"],
        }
        for row in range(ROWS)
    ]
    path.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:25]), path / "a.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(rows[25:]), path / "b.parquet", row_group_size=10)
    return path


def steps(path: Path, refused: Refused, parts: range, worker: int = 0, workers: int = 1) -> list[list[int]]:
    """Rows that a worker gets in each step."""
    data = open_parquet("data", str(path), Storage(), COLUMNS)
    inputs = ModelInputs(Columns(), {"caption": 2}, ImageTransform(32), None, 32, refused, keep=[POSITION])
    order = TrainingOrder(data.row_groups, **ORDER)
    windows = order.windows(parts)
    batch: dict[str, Any] = {name: np.array([window[name] for window in windows]) for name in windows[0]}
    blocks = list(WindowReader(data, order, inputs, COLUMNS, worker, workers)(batch))
    assert all(block["pixels"].shape[1:] == (32, 32, 3) for block in blocks)
    assert all(block["caption_ids"].shape[1:] == (2, 32) for block in blocks)
    assert all(POSITION not in block for block in blocks)
    keys = np.concatenate([block["row_key"] for block in blocks])
    return [[KEYS[key] for key in step] for step in keys.reshape(len(parts), -1).tolist()]


def test_rows_come_in_the_order_of_their_steps(tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "rows", broken=())
    epoch = steps(path, refused, range(5))
    assert sorted(row for step in epoch for row in step) == list(range(ROWS))
    assert steps(path, refused, range(2, 9)) == steps(path, refused, range(9))[2:]
    halves = [steps(path, refused, range(5), worker, 2) for worker in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == epoch


def test_unusable_rows_are_replaced_and_others_keep_their_step(tmp_path: Path, refused: Refused) -> None:
    whole = steps(write(tmp_path / "whole", broken=()), refused, range(5))
    assert not refused.reasons
    broken = steps(write(tmp_path / "broken", BROKEN), refused, range(5))
    assert set(refused.reasons) == {f"row-{row:02d}" for row in BROKEN}
    for before, after in zip(whole, broken, strict=True):
        for old, new in zip(before, after, strict=True):
            assert new not in BROKEN
            assert new == old or old in BROKEN
        assert len(set(after)) == len(after), "no row occurs twice in a batch"
    parts = [steps(tmp_path / "broken", refused, range(5), worker, 4) for worker in range(4)]
    joined = [[row for share in shares for row in share] for shares in zip(*parts, strict=True)]
    assert joined == broken, "the same for any number of workers"


def test_window_without_usable_rows_is_an_error(tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "rows", tuple(range(ROWS)))
    with pytest.raises(DataError, match="rows of a window are unreadable"):
        steps(path, refused, range(3))
