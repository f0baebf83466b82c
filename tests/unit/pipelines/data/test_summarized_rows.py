"""What summarize does with rows that it cannot read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import summarize
from tests.support.broken_rows import jpeg
from tests.support.in_process import manifest, output_rows, quarantined, run_job, without_ray


def texts(*cells: bytes | None) -> pa.Array:
    return pa.array(cells, pa.binary()).view(pa.string())


def run(patch: pytest.MonkeyPatch, path: Path, *settings: str) -> int:
    without_ray(patch)
    return run_job(summarize.main, f"input={path}", f"output={path.parent}/out", "max_rejected_fraction=1", *settings)


def test_rows_that_are_not_utf8_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    columns = {
        "id": texts(b"0", b"1", b"caf\xe9", b"3", None, b"5"),
        "image": pa.array([jpeg(seed) for seed in range(6)]),
        "caption": texts(
            b"A dog. It runs.", b"caf\xe9", b"A cat. It sits.", b"A cow. It eats.", b"A hen. It lays.", b" "
        ),
        "place": texts(b"x", b"x", b"x", b"caf\xe9", None, b"x"),
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=2)
    assert run(monkeypatch, tmp_path / "in.parquet") == 0
    rows = output_rows(tmp_path / "out")
    assert [(row["id"], row["caption"]) for row in rows] == [("0", "A dog. It runs."), (None, "A hen. It lays.")]
    refused = {row["id"]: row["reason"] for row in quarantined(tmp_path / "out")}
    assert refused.keys() == {"1", "in.parquet:2", "3", "5"}
    for key, reason in (("1", "column 'caption'"), ("in.parquet:2", "column 'id'"), ("3", "column 'place'")):
        assert refused[key].startswith(f"{reason} is not valid UTF-8")
    assert refused["5"] == "column 'caption' has no text"
    counts = manifest(tmp_path / "out")["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rejected"]) == (6, 2, 4)
    assert "Samples of rows that were left out" in (tmp_path / "out" / "_report.html").read_text()


@pytest.mark.parametrize(
    "cell", [b"A dog. It runs.", [b"A dog. It runs."], [{"from": "gpt", "value": "A dog. It runs."}]]
)
def test_captions_in_other_forms_are_summarized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cell: Any) -> None:
    pq.write_table(pa.table({"caption": [cell]}), tmp_path / "in.parquet")
    assert run(monkeypatch, tmp_path / "in.parquet", "strategy=first_sentence") == 0
    assert [row["summary"].rstrip(".") for row in output_rows(tmp_path / "out")] == ["A dog"]


def test_rows_of_a_damaged_row_group_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = pa.table({"id": [f"{n}" for n in range(30)], "caption": [f"Text {n}. More." for n in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="gzip")
    content, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert run(monkeypatch, path, "rows_per_piece=25") == 0
    assert [row["id"] for row in output_rows(tmp_path / "out")] == [f"{n}" for n in [*range(10), *range(20, 30)]]
    assert len(quarantined(tmp_path / "out")) == 10
    assert manifest(tmp_path / "out")["counts"]["rows_in"] == 30


def test_rows_of_views_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captions = pa.array(["A cat sits. It is red.", None, "A dog runs. It is brown."], pa.string_view())
    pq.write_table(
        pa.table({"caption": captions, "image": pa.array([b"x"] * 3, pa.binary_view())}), tmp_path / "x.parquet"
    )
    assert run(monkeypatch, tmp_path / "x.parquet") == 0
    assert [row["caption"] for row in output_rows(tmp_path / "out")] == [captions[0].as_py(), captions[2].as_py()]


def test_two_columns_of_captions_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = [pa.array(["A cat."]), pa.array(["A dog."])]
    pq.write_table(pa.Table.from_arrays(columns, names=["caption", "caption"]), tmp_path / "x.parquet")
    assert run(monkeypatch, tmp_path / "x.parquet") == 3
    assert "x.parquet has several columns that are called 'caption'" in capsys.readouterr().err
