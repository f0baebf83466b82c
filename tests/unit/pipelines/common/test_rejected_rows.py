"""Rejected rows: limits and the quarantine file."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from upath import UPath

from longclip.errors import DataError
from pipelines.common.rejected_rows import Quarantine, Rejected, RejectedLimit, write_quarantine


def test_quarantine_counts_a_row_once_and_stops_at_the_limit() -> None:
    quarantine = Quarantine(rows=20, max_rejected_fraction=0.1)
    for _ in range(3):  # a retry reports the same row again
        quarantine.add({"a": "no image"})
    quarantine.add({"b": "no text"})
    message = r"3 of 20 rows rejected, more than max_rejected_fraction=0\.1 allows; the first is 'a': no image"
    with pytest.raises(DataError, match=message):
        quarantine.add({"c": "no text"})
    assert list(quarantine.reasons()) == ["a", "b", "c"]


def test_limit_of_an_unknown_number_of_rows_waits_for_the_end() -> None:
    limit = RejectedLimit(None, max_rejected_fraction=0.5)
    limit.add({"rows_in": 2, "rejected": 2, "first_rejected": "'x': broken"})
    limit.add({"rows_in": 2, "rejected": 0})
    limit.check()
    limit.add({"rows_in": 1, "rejected": 1})
    with pytest.raises(DataError, match=r"3 of 5 rows rejected.*'x': broken"):
        limit.check()


def test_quarantine_file_has_ids_and_reasons(tmp_path: Path) -> None:
    path = UPath(tmp_path / "quarantine.parquet")
    write_quarantine({}, "in.parquet", "embed", path)
    assert not path.exists()
    write_quarantine({"a": "no image"}, "in.parquet", "embed", path)
    row = {"id": "a", "source": "in.parquet", "stage": "embed", "reason": "no image"}
    assert pq.read_table(path.path).to_pylist() == [row]


def test_reasons_that_differ_in_numbers_and_names_are_one_group() -> None:
    rejected = Rejected("in.parquet")
    for width in (3, 4):
        rejected.add(f"row-{width}", "image", f"'photo-{width}' is {width} pixels wide")
    assert rejected.grouped == [("image", "… is … pixels wide", 2)]
