"""Parquet sources: damaged and empty files, large row groups, and the types in which images and texts are stored."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from pipelines.common.storage import Storage
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Source, SourceRow
from tests.support.broken_rows import jpeg


def open_set(path: Path, **settings: Any) -> Source:
    return open_source("input", str(path), SourceSettings(**settings), Storage())


def read_all(source: Source) -> list[SourceRow]:
    return [row for piece in source.pieces(UPath("unused")) for row in source.read(piece)]


def numbered(path: Path, count: int, **options: Any) -> Path:
    rows = [{"id": f"{n}", "image": jpeg(n % 7), "caption": f"Text {n}."} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def damage(path: Path, group: int) -> None:
    """Overwrite the images of a row group."""
    content, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


def test_intact_row_groups_of_a_damaged_file_are_read(tmp_path: Path) -> None:
    path = numbered(tmp_path / "x.parquet", 50, row_group_size=10, compression="gzip")
    damage(path, 1)
    rows = read_all(open_set(path))
    assert [row.captions == [f"Text {n}."] for n, row in enumerate(rows)] == [not 10 <= n < 20 for n in range(50)]
    assert [row.id for row in rows[9:12]] == ["9", "x-00000010", "x-00000011"]
    assert str(rows[10].problem).startswith("file is damaged at this row: ")


def test_changed_bytes_are_found_by_the_checksum_of_their_page(tmp_path: Path) -> None:
    path = numbered(
        tmp_path / "x.parquet",
        20,
        row_group_size=10,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Text 15.", b"Test 15."))
    rows = read_all(open_set(path))
    assert [row.problem is None for row in rows] == [True] * 10 + [False] * 10


@pytest.mark.parametrize(("rows", "per_piece", "pieces"), [(50, 10, 5), (50, 1, 16), (50, 30, 1), (50, 25, 2)])
def test_one_large_row_group_is_cut(tmp_path: Path, rows: int, per_piece: int, pieces: int) -> None:
    source = open_set(numbered(tmp_path / "x.parquet", rows), rows_per_piece=per_piece)
    plan = source.pieces(UPath("unused"))
    assert len(plan) == pieces
    assert sum(piece.rows or 0 for piece in plan) == rows
    assert [row.id for piece in plan for row in source.read(piece)] == [f"{n}" for n in range(rows)]


def test_large_and_small_row_groups_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary()), ("caption", pa.string())])) as writer:
        for first, count in ((0, 3), (3, 70), (73, 2), (75, 2)):
            texts = [f"{n}" for n in range(first, first + count)]
            writer.write_table(pa.table({"image": [b"x"] * count, "caption": texts}))
    source = open_set(path, rows_per_piece=10)
    rows = read_all(source)
    assert [row.captions for row in rows] == [[f"{n}"] for n in range(77)]
    assert [row.id for row in rows] == [f"x-{n:08d}" for n in range(77)]
    assert [piece.rows for piece in source.pieces(UPath("unused"))] == [3, *[10] * 7, 4]


def test_empty_files_and_columns_without_values_are_passed_over(tmp_path: Path) -> None:
    nothing = pa.table({"id": pa.nulls(0), "image": pa.nulls(0), "caption": pa.nulls(0)})
    pq.write_table(nothing, tmp_path / "0.parquet")
    pq.write_table(pa.table({}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"id": ["a"], "image": [b"x"], "caption": pa.nulls(1)}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"id": ["b"], "image": [b"x"], "caption": ["x"]}), tmp_path / "3.parquet")
    assert [(row.id, row.problem) for row in read_all(open_set(tmp_path))] == [("a", "caption is missing"), ("b", None)]


HUGGING_FACE = [{"bytes": jpeg(1), "path": "a.jpg"}]
READ = (jpeg(1), None)


@pytest.mark.parametrize(
    ("cells", "kind", "expected"),
    [
        ([list(jpeg(1)), None], pa.list_(pa.uint8()), [READ, (b"", "has no image")]),
        ([[byte - 256 * (byte > 127) for byte in jpeg(1)]], pa.large_list(pa.int8()), [READ]),
        ([list(jpeg(1)), [1, 999]], pa.list_(pa.int64()), [READ, (b"", "numbers that are not bytes")]),
        ([HUGGING_FACE, HUGGING_FACE * 2, []], None, [READ, (b"", "row has 2 images"), (b"", "has no image")]),
        ([[jpeg(1)], [jpeg(1), None]], None, [READ, READ]),
        ([{"bytes": list(jpeg(1)), "path": None}], None, [READ]),
        ([b"a.jpg", b"b.jpg", b"broken"], pa.binary(), [READ, (b"", "'b.jpg' does not exist"), (b"broken", None)]),
        ([["a.jpg"]], None, [READ]),
        ([[[1, 2], [3, 4]]], None, [(b"", "an array of pixels")]),
        ([1.5], None, [(b"", "neither bytes nor a path or URI but float")]),
    ],
)
def test_types_of_images(tmp_path: Path, cells: list[Any], kind: Any, expected: list[tuple[bytes, str | None]]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    pq.write_table(pa.table({"image": pa.array(cells, kind), "caption": ["x"] * len(cells)}), tmp_path / "x.parquet")
    for row, (image, problem) in zip(read_all(open_set(tmp_path / "x.parquet")), expected, strict=True):
        assert row.image == image
        assert (problem is None) == (row.problem is None)
        assert (problem or "") in (row.problem or "")


TURNS = [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": "A dog."}]


@pytest.mark.parametrize(
    ("cells", "lists"),
    [
        (["A dog."], False),
        ([b"A dog."], False),
        ([["A dog."]], True),
        ([[b"A dog."]], True),
        ([[{"caption": "A dog."}]], True),
        ([{"raw": ["A dog."]}], True),
        ([TURNS], False),
        ([{"from": ["human", "gpt"], "value": ["Describe.", "A dog."]}], False),
    ],
)
def test_types_of_captions(tmp_path: Path, cells: list[Any], lists: bool) -> None:
    pq.write_table(pa.table({"image": [b"x"], "caption": cells}), tmp_path / "x.parquet")
    source = open_set(tmp_path / "x.parquet")
    assert source.lists == lists
    assert [(row.captions, row.problem) for row in read_all(source)] == [(["A dog."], None)]


def test_texts_that_are_not_utf8_are_problems_of_their_rows(tmp_path: Path) -> None:
    good, bad = b"good", b"caf\xe9"
    columns = {"id": [good, bad, good, good, good], "image": [good, good, bad, good, good]}
    columns |= {"caption": [good, good, good, bad, good], "place": [good, good, good, good, bad]}
    texts = {name: pa.array(cells, pa.binary()).view(pa.string()) for name, cells in columns.items()}
    pq.write_table(pa.table(texts), tmp_path / "x.parquet")
    rows = read_all(open_set(tmp_path / "x.parquet", keep=["place"]))
    for row, name in zip(rows[1:], columns, strict=True):
        assert str(row.problem).startswith(f"column '{name}' is not valid UTF-8")
    assert [row.id for row in rows] == ["good", "x-00000001", "good", "good", "good"]


def test_files_may_differ_in_how_they_store_texts(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"id": pa.array([1], pa.int32()), "image": [b"x"], "caption": ["a"]}
    pq.write_table(pa.table(columns), tmp_path / "1.parquet")
    columns |= {"id": pa.array([2], pa.int64()), "caption": pa.array([b"b"], pa.large_binary())}
    pq.write_table(pa.table(columns), tmp_path / "2.parquet")
    assert [(row.id, row.captions) for row in read_all(open_set(tmp_path))] == [("1", ["a"]), ("2", ["b"])]
