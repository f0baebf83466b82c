"""Containers that are read to their end: compressed tars, CSV, Parquet's lists and column names, evaluation sets."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from longclip.errors import DataError
from pipelines import prepare
from pipelines.common.storage import Storage
from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import SourceRow
from tests.support.broken_rows import jpeg
from tests.support.in_process import output_rows, run_job, without_ray
from tests.support.layouts import image_folder, parquet_bytes, write_images, write_lines, write_tar

MEMBERS = [(f"{n}.{part}", data) for n in range(4) for part, data in (("jpg", jpeg(n)), ("txt", b"A dog."))]


def rows_of(path: Path, scratch: Path, **settings: Any) -> list[SourceRow]:
    scratch.mkdir(exist_ok=True)
    source = open_source("input", str(path), SourceSettings(**settings), Storage())
    return [row for piece in source.pieces(UPath(scratch)) for row in source.read(piece)]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_tars_compressed_in_parts_are_read_to_their_end(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    plain = write_tar(tmp_path / "plain.tar", MEMBERS).read_bytes()
    parts = [compress(plain[start : start + 3000]) for start in range(0, len(plain), 3000)]
    path = tmp_path / f"x.tar.{suffix}"
    path.write_bytes(b"".join(parts))
    rows = rows_of(path, tmp_path / "scratch")
    assert [(row.image, row.problem) for row in rows] == [(jpeg(n), None) for n in range(4)]
    path.write_bytes(b"".join(parts)[:-200])
    assert "tar is truncated or damaged" in str(rows_of(path, tmp_path / "cut")[-1].problem)


def test_a_tar_sample_with_two_images_or_texts_is_not_guessed(tmp_path: Path) -> None:
    images = [("0.jpg", jpeg(0)), ("0.png", jpeg(1)), ("0.txt", b"A dog.")]
    texts = [("1.jpg", jpeg(0)), ("1.txt", b"A dog."), ("1.caption", b"A cat.")]
    path = write_tar(tmp_path / "x.tar", [*images, *texts])
    problems = [str(row.problem) for row in rows_of(path, tmp_path / "scratch")]
    assert "sample has .jpg, .png; name the one to read with --set source.image=jpg" in problems[0]
    assert "sample has .caption, .txt; name the one to read with --set source.caption=" in problems[1]
    named = rows_of(path, tmp_path / "scratch", image="png", caption="txt")
    assert (named[0].image, named[0].captions, named[0].problem) == (jpeg(1), ["A dog."], None)


def test_tar_with_a_wrong_checksum_or_another_tar_behind_it_is_reported(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "x.tar", MEMBERS).read_bytes()
    packed = bytearray(gzip.compress(plain))
    packed[-6] ^= 255
    for content, problem in ((packed, "CRC check failed"), (plain + plain, "join tars with tar --concatenate")):
        (tmp_path / "x.tar").write_bytes(content)
        rows = rows_of(tmp_path / "x.tar", tmp_path / "scratch")
        assert [row.problem is None for row in rows] == [True] * 4 + [False]
        assert problem in str(rows[-1].problem)


def test_misquoted_csv_rows_are_rejected_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "set")
    lines = [
        "file_name,text",
        'x.jpg,"never closed',
        'y.jpg,"A "big" dog."',
        '"a.jpg","two\r',
        'lines"',
        'b.jpg,5" long',
    ]
    (tmp_path / "set" / "metadata.csv").write_text("\n".join([*lines, f'c.jpg,"{"x " * 99999}"', ""]))
    rows = rows_of(tmp_path / "set", tmp_path / "scratch")
    assert [(row.id, row.captions) for row in rows[2:]] == [
        ("a.jpg", ["two\r\nlines"]),
        ("b.jpg", ['5" long']),
        ("c.jpg", ["x " * 99999]),
    ]
    assert ["line 2 is not valid CSV" in str(rows[0].problem), "line 3 is" in str(rows[1].problem)] == [True] * 2
    (tmp_path / "set" / "metadata.csv").write_text('"file_name')
    with pytest.raises(DataError, match="is not valid CSV: unexpected end of data in line 1"):
        rows_of(tmp_path / "set", tmp_path / "scratch")


def test_all_captions_of_odd_parquet_lists_are_read(tmp_path: Path) -> None:
    views = pa.array([["A.", "B."]], pa.list_view(pa.string()))
    structs = pa.array([{"sentids": [7], "raw": ["A.", "B."]}])
    for number, captions in enumerate((views, structs)):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": [jpeg(1)], "caption": captions}), path)
        (row,) = rows_of(path, tmp_path / "scratch")
        assert (row.captions, row.problem) == (["A.", "B."], None)


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ({"long_caption": None, "caption": "A."}, ["A."]),
        ([{"raw": None}, {"raw": "A."}], ["A."]),
        ({"raw": ["A."], "sentids": [1, 2]}, ["A."]),
    ],
)
def test_null_fields_of_structs_are_absent(cell: Any, texts: list[str]) -> None:
    assert caption_texts(cell) == (texts, None)


def test_columns_with_the_same_name_are_an_error_only_if_they_are_read(tmp_path: Path) -> None:
    path, columns = tmp_path / "x.parquet", [pa.array([jpeg(1)]), pa.array(["A."]), pa.array(["B."])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "caption"]), path)
    with pytest.raises(DataError, match=r"x.parquet has 2 columns that are called 'caption'; rename all but one"):
        rows_of(path, tmp_path / "scratch")
    pq.write_table(pa.Table.from_arrays([*columns, columns[2]], names=["image", "caption", "x", "x"]), path)
    assert rows_of(path, tmp_path / "scratch")[0].captions == ["A."]


def test_sets_without_entries_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match=r"input='.*x.json' has no entry that"):
        rows_of(tmp_path / "x.json", tmp_path / "scratch")


def test_kept_columns_do_not_collide_with_those_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    settings = f"input={parquet_bytes(tmp_path)}", f"output={tmp_path}/out"
    assert run_job(prepare.main, *settings, "source.keep=[width]") == 2
    assert "source.keep='width' is a column of the output" in capsys.readouterr().err
    assert run_job(prepare.main, *settings, "source.keep=[key,key]") == 0
    assert [row["key"] for row in output_rows(tmp_path / "out")] == ["a", "b", "c"]


def test_captions_of_evaluation_sets_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    image_folder(tmp_path / "in")
    write_images(tmp_path / "latin")
    (tmp_path / "latin" / "a.txt").write_bytes(b"caf\xe9")
    write_images(tmp_path / "half")
    write_lines(tmp_path / "half" / "x.jsonl", [{"image": f"{stem}.jpg", "caption": "half \ud83d"} for stem in "ab"])
    write_images(tmp_path / "listed")
    (tmp_path / "listed" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": 7}))
    write_tar(tmp_path / "large.tar", [("a.jpg", jpeg(1)), ("a.txt", b"x" * 2_000_000)])
    for name, left in (("latin", 0), ("half/x.jsonl", 1), ("listed", 0), ("large.tar", 2)):
        output = tmp_path / "out" / name.replace("/", "-")
        settings = f"input={tmp_path}/in", f"output={output}", f"exclude_overlap_with={tmp_path}/{name}"
        assert run_job(prepare.main, *settings, "max_rejected_fraction=1") == (0 if left else 3)
        assert not left or len(output_rows(output)) == left
