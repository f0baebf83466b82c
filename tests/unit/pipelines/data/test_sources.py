"""Sources: every layout gives the same rows, and reports its problems row by row."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from longclip.errors import DataError
from pipelines.common.storage import Storage
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Source, SourceRow
from tests.support.broken_rows import jpeg
from tests.support.layouts import (
    IMAGES,
    LAYOUTS,
    TEXTS,
    coco,
    docci,
    image_folder,
    jsonl,
    sharegpt4v,
    urban1k,
    webdataset,
    write_images,
    write_json,
    write_parquet,
    write_tar,
)


def open_set(path: Path | str, **settings: Any) -> Source:
    return open_source("input", str(path), SourceSettings(**settings), Storage())


def read_all(source: Source, scratch: Path | UPath) -> list[SourceRow]:
    """Rows of all pieces, each read by a pickled copy of the source, as in a task."""
    scratch.mkdir(parents=True, exist_ok=True)
    pieces = source.pieces(UPath(scratch))
    return [row for piece in pieces for row in pickle.loads(pickle.dumps(source)).read(piece)]  # noqa: S301


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_detected_and_gives_the_same_rows(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = layout(tmp_path / "set")
    source = open_set(path, rows_per_piece=2)
    rows = read_all(source, tmp_path / "scratch")
    assert [row.problem for row in rows] == [None] * 3
    assert [row.image for row in rows] == list(IMAGES.values())
    assert [" ".join(row.captions).replace("\n", " ") for row in rows] == [t.replace("\n", " ") for t in TEXTS.values()]
    assert not source.lists
    assert len({row.id for row in rows}) == 3
    assert read_all(open_set(path, rows_per_piece=2), tmp_path / "another scratch") == rows


def test_sources_on_another_filesystem(tmp_path: Path) -> None:
    root = UPath("memory://sources/set")
    for file in [docci(tmp_path), *(tmp_path / "images").iterdir()]:
        target = root / str(file.relative_to(tmp_path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    source = open_set("memory://sources/set/docci.jsonlines")
    assert [row.image for row in read_all(source, tmp_path / "scratch")] == list(IMAGES.values())
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["1"], "image": ["memory://sources/set/images/b.jpg"], "caption": ["x"]}), table)
    (root / "uris.parquet").write_bytes(table.getvalue())
    (row,) = read_all(open_set("memory://sources/set/uris.parquet", uri_schemes=["memory"]), tmp_path / "scratch")
    assert row.image == IMAGES["b"]
    (row,) = read_all(open_set("memory://sources/set/uris.parquet"), tmp_path / "scratch")
    assert row.problem is not None
    assert "scheme 'memory' is not in source.uri_schemes" in row.problem
    root.fs.rm("/sources", recursive=True)


def test_images_in_another_directory(tmp_path: Path) -> None:
    path = sharegpt4v(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    rows = read_all(open_set(path, images=str(tmp_path / "photos")), tmp_path / "scratch")
    assert [row.image for row in rows] == list(IMAGES.values())
    assert [row.id for row in rows] == ["coco/a.jpg", "coco/b.jpg", "coco/c.jpg"]


def test_several_captions_per_image_stay_a_list(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "x.token").write_text("".join(f"{stem}.jpg#{n}\t{stem} {n}\n" for stem in IMAGES for n in range(5)))
    karpathy = [
        {"filepath": "val2014", "filename": f"{stem}.jpg", "cocoid": n, "sentences": [{"raw": "One."}, {"raw": "Two."}]}
        for n, stem in enumerate(IMAGES)
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    write_images(tmp_path / "val2014")
    tokens, karpathy_splits = open_set(tmp_path / "x.token"), open_set(tmp_path / "dataset_coco.json")
    assert tokens.lists
    assert karpathy_splits.lists
    rows = read_all(tokens, tmp_path / "scratch 1")
    assert rows[1].captions == ["b 0", "b 1", "b 2", "b 3", "b 4"]
    rows = read_all(karpathy_splits, tmp_path / "scratch 2")
    assert [(row.id, row.captions, row.image) for row in rows][2] == ("2", ["One.", "Two."], IMAGES["c"])


def test_listing_problems_are_reported_per_row(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = [
        json.dumps({"id": "good", "image": "a.jpg", "caption": "x"}),
        "{broken",
        "[1, 2]",
        json.dumps({"id": "no image", "caption": "x"}),
        json.dumps({"id": "no caption", "image": "a.jpg"}),
        json.dumps({"id": "number", "image": "a.jpg", "caption": 7}),
        json.dumps({"id": "missing", "image": "z.jpg", "caption": "x"}),
        json.dumps({"id": "above", "image": "../secret.jpg", "caption": "x"}),
        json.dumps({"id": "absolute", "image": "/etc/passwd", "caption": "x"}),
        json.dumps({"id": "web", "image": "https://example.org/a.jpg", "caption": "x"}),
        json.dumps({"id": "file", "image": "file:///etc/passwd", "caption": "x"}),
        json.dumps({"id": "list", "image": "a.jpg", "caption": ["x", "y"]}),
    ]
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    write_images(tmp_path / "set")
    (tmp_path / "set" / "rows.jsonl").write_text("\n".join(lines))
    rows = read_all(open_set(tmp_path / "set" / "rows.jsonl"), tmp_path / "scratch")
    expected = {
        "good": None,
        "00000001": "line 2 is not valid JSON",
        "00000002": "entry is not a JSON object but list",
        "no image": "entry has no image",
        "no caption": "entry has no caption",
        "number": "caption is not a text but int",
        "missing": "image 'z.jpg' does not exist",
        "above": "image '../secret.jpg' is not a path below source.images",
        "absolute": "image '/etc/passwd' is not a path below source.images",
        "web": "scheme 'https' is not in source.uri_schemes; download it first",
        "file": "scheme 'file' is not in source.uri_schemes",
    }
    problems = {row.id: row.problem for row in rows}
    assert problems.pop("list") is None, "the first entries decide whether captions are lists"
    assert problems.keys() == expected.keys()
    for key, part in expected.items():
        assert (part is None) == (problems[key] is None), key
        assert part is None or part in str(problems[key])


def test_images_without_text_and_texts_without_image_have_a_problem(tmp_path: Path) -> None:
    urban1k(tmp_path / "set")
    (tmp_path / "set" / "caption" / "b.txt").unlink()
    (tmp_path / "set" / "caption" / "z.txt").write_text("Nothing to see.")
    rows = read_all(open_set(tmp_path / "set"), tmp_path / "scratch")
    assert {row.id: row.problem for row in rows} == {
        "a": None,
        "b": "image has no .txt file with its caption",
        "c": None,
        "z": "'z.txt' has no image",
    }


def test_coco_captions_of_unlisted_images_have_a_problem(tmp_path: Path) -> None:
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    content["annotations"] += [{"image_id": 99, "caption": "x"}] * 2
    content["images"].append({"id": 50, "file_name": "c.jpg"})
    rows = read_all(open_set(write_json(path, content)), tmp_path / "scratch")
    problems = {row.id: row.problem for row in rows if row.problem}
    assert problems == {"99": "2 captions of an image that is not in `images`", "50": "caption is missing"}


def test_too_large_images_are_not_read(tmp_path: Path) -> None:
    for path in (image_folder(tmp_path / "files"), webdataset_in(tmp_path / "tars")):
        rows = read_all(open_set(path, max_image_bytes=100), tmp_path / f"scratch {path.name}")
        assert len(rows) == 3
        assert all(row.image == b"" and row.problem for row in rows)


def webdataset_in(folder: Path) -> Path:
    folder.mkdir()
    return webdataset(folder)


def test_truncated_tar_gives_its_complete_samples(tmp_path: Path) -> None:
    members = [(f"{n:03d}.{part}", data) for n in range(20) for part, data in (("jpg", jpeg(n)), ("txt", b"x"))]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        between = tar.getmembers()[20].offset  # where a sample begins: only the end mark is missing
    for length in (int(0.3 * len(whole)), int(0.5 * len(whole)), int(0.77 * len(whole)), between, between + 99):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        rows = read_all(open_set(tmp_path / "cut.tar"), tmp_path / "scratch")
        good = [row for row in rows if row.problem is None]
        assert [row.image for row in good] == [jpeg(n) for n in range(len(good))]
        assert 0.8 * 20 * length / len(whole) - 2 < len(good) < 20
        assert "tar is truncated or damaged" in str(rows[-1].problem)


def test_damaged_tar_header_is_reported(tmp_path: Path) -> None:
    members = [(f"{n:03d}.{part}", data) for n in range(20) for part, data in (("jpg", jpeg(n)), ("txt", b"x"))]
    content = bytearray(write_tar(tmp_path / "x.tar", members).read_bytes())
    with tarfile.open(tmp_path / "x.tar") as tar:
        header = tar.getmembers()[20].offset
    content[header : header + 100] = b"?" * 100
    (tmp_path / "x.tar").write_bytes(content)
    rows = read_all(open_set(tmp_path / "x.tar"), tmp_path / "scratch")
    assert [row.problem is None for row in rows] == [True] * 10 + [False]


def test_incomplete_tar_samples_have_a_problem(tmp_path: Path) -> None:
    members = [
        ("good.jpg", jpeg(1)),
        ("good.txt", b"x"),
        ("textless.jpg", jpeg(2)),
        ("imageless.txt", b"x"),
        ("malformed.jpg", jpeg(3)),
        ("malformed.json", b"{"),
        ("recaptioned.jpg", jpeg(4)),
        ("recaptioned.txt", b"short"),
        ("recaptioned.json", json.dumps({"caption": "short", "long_caption": "A long one."}).encode()),
    ]
    rows = {row.id: row for row in read_all(open_set(write_tar(tmp_path / "x.tar", members)), tmp_path / "scratch")}
    assert rows["good"].problem is None
    assert "sample has no caption, only .jpg" in str(rows["textless"].problem)
    assert "sample has no image, only .txt" in str(rows["imageless"].problem)
    assert ".json file is not valid JSON" in str(rows["malformed"].problem)
    assert rows["recaptioned"].captions == ["A long one."]


def test_damaged_parquet_gives_a_problem_for_each_lost_row(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "image": jpeg(n), "caption": f"Text {n}."} for n in range(40)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="gzip")
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(2).column(1)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(content)
    read_rows = read_all(open_set(path, rows_per_piece=10), tmp_path / "scratch")
    assert len(read_rows) == 40
    assert [row.problem is None for row in read_rows] == [not 20 <= n < 30 for n in range(40)]


@pytest.mark.parametrize(
    ("name", "content", "settings", "expected"),
    [
        ("x.xml", b"a,b", {}, "has an unknown layout; name it with --set source.format="),
        ("x.csv", b"filepath,title", {}, "has no entry that csv could read"),
        ("x.json", b'{"a": 1}', {}, "has an unknown layout"),
        ("x.json", b'[{"id": 1}, {"id": 2', {}, "cannot be read as sharegpt4v"),
        ("x.json", b"\xff\xfe[broken", {"format": "coco"}, "cannot be read as coco"),
        ("x.parquet", b"not parquet", {}, "cannot be read as Parquet"),
        ("x.tar", bytes(10240), {}, "contains no samples"),
    ],
)
def test_unreadable_sources_are_named_in_the_error(
    tmp_path: Path, name: str, content: bytes, settings: dict[str, Any], expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        read_all(open_set(tmp_path / name, **settings), tmp_path / "scratch")
    assert str(tmp_path / name) in str(error.value)


def test_missing_columns_are_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", k=["1"], picture=[jpeg(1)], words=["x"])
    with pytest.raises(DataError, match=r"no image column \(under any well-known name\); it has k, picture, words;"):
        open_set(path)
    with pytest.raises(DataError, match=r"no caption column \('wrods'\)"):
        open_set(path, image="picture", caption="wrods")
    (row,) = read_all(open_set(path, image="picture", caption="words", id="k"), tmp_path / "scratch")
    assert (row.id, row.captions, row.image) == ("1", ["x"], jpeg(1))


def test_listing_entries_are_written_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path)
    scratch = tmp_path / "scratch"
    before = read_all(open_set(path), scratch)
    path.write_text(path.read_text().splitlines()[0])
    assert read_all(open_set(path), scratch) == before, "a running job must keep the pieces it started with"


Read = tuple[str | None, list[str], bool]
"""Problem and captions of a row, and whether it has one of the images."""


def test_images_without_captions_are_read_if_captions_are_optional(tmp_path: Path) -> None:
    def read_optional(path: Path, **settings: Any) -> dict[str, Read]:
        source = open_source("input", str(path), SourceSettings(**settings), Storage(), captions_required=False)
        rows = read_all(source, tmp_path / f"scratch {path.name}")
        return {row.id: (row.problem, row.captions, row.image in (jpeg(1), jpeg(2))) for row in rows}

    nothing: Read = (None, [], True)
    short: Read = (None, ["A dog."], True)
    parquet = write_parquet(tmp_path / "x.parquet", id=["a", "b"], image=[jpeg(1), jpeg(2)])
    assert read_optional(parquet) == {"a": nothing, "b": nothing}
    parquet = write_parquet(tmp_path / "y.parquet", id=["a", "b"], image=[jpeg(1), jpeg(2)], text=[None, "A dog."])
    assert read_optional(parquet) == {"a": nothing, "b": short}
    for configured in ("caption", "label"):
        with pytest.raises(DataError, match=r"no caption column \('txet'\)"):
            read_optional(parquet, **{configured: "txet"})
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("b.txt", b"A dog.")])
    assert read_optional(tar) == {"a": nothing, "b": short}
    folder = tmp_path / "folder" / "below"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(jpeg(1))
    (folder / "b.jpg").write_bytes(jpeg(2))
    (folder / "b.txt").write_text("A dog.")
    (folder / "z.txt").write_text("No image.")
    lost: Read = ("'below/z.txt' has no image", [], False)
    assert read_optional(folder.parent) == {"below/a": nothing, "below/b": short, "below/z": lost}
    lines = [{"id": "a", "image": "below/a.jpg"}, {"id": "b", "image": "below/b.jpg", "text": "A dog."}, {"id": "c"}]
    listing = folder.parent / "x.jsonl"
    listing.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_optional(listing) == {"a": nothing, "b": short, "c": ("entry has no image", [], False)}
    everything = {"images": [{"id": 1, "file_name": "below/a.jpg"}], "annotations": []}
    listing = write_json(folder.parent / "x.json", everything)
    assert read_optional(listing) == {"1": nothing}
