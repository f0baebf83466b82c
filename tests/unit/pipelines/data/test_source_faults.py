"""Faults of sources that are files: none loses a row or caption in silence, and none ends the job."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines.common.storage import Storage
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import SourceRow
from pipelines.data.workspace import fingerprint
from tests.support.broken_rows import jpeg
from tests.support.layouts import IMAGES, image_folder, parquet_bytes, write_images, write_lines, write_tar


def rows_of(path: Path, scratch: Path, **settings: Any) -> list[SourceRow]:
    scratch.mkdir(exist_ok=True)
    source = open_source("input", str(path), SourceSettings(**settings), Storage())
    source.describe()
    return [row for piece in source.pieces(UPath(scratch)) for row in source.read(piece)]


def tar_rows(folder: Path, members: list[tuple[str, bytes]], **settings: Any) -> dict[str, SourceRow]:
    rows = rows_of(write_tar(folder / "x.tar", members), folder / "scratch", **settings)
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


@pytest.mark.parametrize("name", ["A.PARQUET", "a.parq", "a.pq", "data/a.parquet", "x=1/y=2/a.parquet"])
def test_parquet_is_found_by_every_suffix_and_at_every_depth(tmp_path: Path, name: str) -> None:
    (tmp_path / "set" / name).parent.mkdir(parents=True)
    parquet_bytes(tmp_path).rename(tmp_path / "set" / name)
    for extra in ("README.md", ".gitattributes", "_SUCCESS", "._a.parquet"):
        (tmp_path / "set" / extra).write_text("x")
    assert len(rows_of(tmp_path / "set", tmp_path / "scratch")) == 3
    source = open_source("input", str(tmp_path / "set"), SourceSettings(), Storage())
    assert "other files: 3 hidden, 1 .md" in source.describe()


def test_links_are_followed_once_and_dangling_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    parquet_bytes(tmp_path).rename(tmp_path / "blobs" / "abc")
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "a.parquet").symlink_to("../../blobs/abc")
    (tmp_path / "set" / "data" / "circle").symlink_to("..")
    assert len(rows_of(tmp_path / "set", tmp_path / "scratch")) == 3
    before = fingerprint("input", str(tmp_path / "set"), Storage())
    os.utime(tmp_path / "blobs" / "abc", (1, 1))
    assert fingerprint("input", str(tmp_path / "set"), Storage()) != before
    (tmp_path / "set" / "b.parquet").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"'b.parquet' is a symbolic link to 'nowhere', which does not exist"):
        rows_of(tmp_path / "set", tmp_path / "scratch")


def test_odd_files_of_a_folder_are_rows_with_a_problem(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set")
    for stem in ("dangling", "circle", "latin"):
        (folder / f"{stem}.jpg").write_bytes(jpeg(5))
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "circle.jpg").unlink()
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "circle.txt").write_text("x")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "_DSC1.JPG").write_bytes(jpeg(6))
    (folder / "_DSC1.TXT").write_bytes("Größe".encode("utf-16"))
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.jpg")).write_bytes(jpeg(7))
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.txt")).write_text("x")
    rows = {row.id: row for row in rows_of(folder, tmp_path / "scratch")}
    assert rows["_DSC1"].captions == ["Größe"]
    problems = {key: str(row.problem) for key, row in rows.items() if row.problem}
    assert problems.keys() == {"dangling", "circle", "latin", "caf\\udce9"}
    assert "'dangling.txt' does not exist" in problems["dangling"]
    assert "symbolic link in a circle" in problems["circle"]
    assert "--set source.encoding=" in problems["latin"]
    assert "rename the file" in problems["caf\\udce9"]
    (latin,) = [row for row in rows_of(folder, tmp_path / "2", encoding="latin-1") if row.id == "latin"]
    assert latin.captions == ["café"]


def test_imagefolder_reads_metadata_relative_to_its_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "train")
    rows = [{"file_name": "a.jpg", "text": "A."}, {"file_name": "b.jpg", "text": None}]
    write_lines(tmp_path / "set" / "train" / "metadata.jsonl", rows)
    read = {row.id: row for row in rows_of(tmp_path / "set", tmp_path / "scratch")}
    assert (read["train/a.jpg"].captions, read["train/a.jpg"].image) == (["A."], IMAGES["a"])
    assert read["train/b.jpg"].problem == "entry has no caption"
    assert read["train/c.jpg"].problem == "image is not listed in a metadata file"


def test_references_that_are_no_paths_are_rejected_in_a_few_words(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = ["a.jpg", "x" * 300 + ".jpg", "iVBORw0KGgo" * 900, "a\0.jpg", "s3://[", "\ud83d.jpg", ["a.jpg", "b.jpg"]]
    lines = write_lines(tmp_path / "x.jsonl", [{"image": image, "caption": "x"} for image in images])
    rows = rows_of(lines, tmp_path / "scratch", uri_schemes=[])
    expected = [
        None,
        "too long",
        "is base64 text",
        "NUL character",
        "scheme 's3' is not in",
        "not valid Unicode",
        "2 im",
    ]
    for row, part in zip(rows, expected, strict=True):
        assert part is None if row.problem is None else part is not None and part in row.problem
        assert len(row.problem or "") < 250


def test_encodings_of_json(tmp_path: Path) -> None:
    write_images(tmp_path)
    entries = [{"image": "a.jpg", "caption": "Größe"}, {"image": "b.jpg", "caption": "x"}]
    for number, encoding in enumerate(["utf-8-sig", "utf-16", "utf-32"]):
        for name, text in [("x.json", json.dumps(entries, ensure_ascii=False)), ("x.jsonl", json.dumps(entries[0]))]:
            (tmp_path / name).write_bytes(text.encode(encoding))
            rows = rows_of(tmp_path / name, tmp_path / f"{number} {name}")
            assert json.loads(f'"{rows[0].captions[0]}"') in ("Größe",)
    (tmp_path / "x.json").write_bytes(json.dumps(entries, ensure_ascii=False).encode("latin-1"))
    first, second = rows_of(tmp_path / "x.json", tmp_path / "latin")
    assert "entry 1 is not valid utf-8" in str(first.problem)
    assert second.problem is None
    (tmp_path / "x.json").write_text(r'[{"image": "a.jpg", "caption": "x\ud800y"}]')
    (row,) = rows_of(tmp_path / "x.json", tmp_path / "surrogate")
    assert "half of a surrogate pair" in str(row.problem)
    with pytest.raises(ValueError, match="is not an encoding that Python knows"):
        SourceSettings(encoding="klingon")


def test_samples_with_full_stops_in_their_names(tmp_path: Path) -> None:
    names = ["v1.0_a", "v1.0_b", "v1.0_b.2"]
    parts = [(f"{name}.{part}", data) for name in names for part, data in (("jpg", jpeg(1)), ("txt", name.encode()))]
    parts += [
        ("s.input.png", jpeg(2)),
        ("s.output.txt", b"s"),
        ("t.jpg", jpeg(3)),
        ("t.mask.png", b""),
        ("t.txt", b"t"),
    ]
    rows = tar_rows(tmp_path, parts)
    assert {row.captions[0] for row in rows.values() if not row.problem} >= {"v1.0_a", "v1.0_b", "s", "t"}
    assert rows["t"].image == jpeg(3)


def test_named_members_of_a_tar(tmp_path: Path) -> None:
    members = [("s.a.jpg", jpeg(1)), ("s.b.jpg", jpeg(2)), ("s.en.txt", b"en"), ("s.de.txt", b"de")]
    row = tar_rows(tmp_path, members, image="b.jpg", caption="de.txt")["s"]
    assert (row.image, row.captions, row.problem) == (jpeg(2), ["de"], None)
    row = tar_rows(tmp_path, [*members, ("s.json", b'{"k": 7}')], image="a.jpg", id="k")["7"]
    assert "name the one to read with --set source.caption=" in str(row.problem)


def test_tar_samples_keep_their_row_despite_their_side_files(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg(1)), ("a.json", b"{broken"), ("a.txt", b"A."), ("a.npy", bytes(2 * 1024 * 1024))]
    members += [
        ("b.jpg", jpeg(2)),
        ("b.json", b'{"caption": null}'),
        ("b.txt", b"B."),
        ("._b.jpg", b"x"),
        ("c.jfif", b"c"),
    ]
    members += [("c.json", json.dumps({"conversations": [{"from": "gpt", "value": "C."}]}).encode()), ("README", b"x")]
    rows = tar_rows(tmp_path, members)
    assert {key: (row.captions, row.problem) for key, row in rows.items()} == {
        "a": (["A."], None),
        "b": (["B."], None),
        "c": (["C."], None),
    }


def test_key_that_comes_twice_gives_both_rows(tmp_path: Path) -> None:
    twice = [("a.jpg", jpeg(1)), ("a.txt", b"A."), ("a.jpg", jpeg(2)), ("a.txt", b"B.")]
    rows = rows_of(write_tar(tmp_path / "x.tar", twice), tmp_path / "scratch")
    assert [(row.image, row.captions) for row in rows] == [(jpeg(1), ["A."]), (jpeg(2), ["B."])]


def test_late_lists_and_empty_tars(tmp_path: Path) -> None:
    one, two = json.dumps({"captions": ["1."]}).encode(), json.dumps({"captions": ["1.", "2."]}).encode()
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.TAR", [])
    late = [(f"{n}.{s}", d) for n, text in enumerate([one, two]) for s, d in (("jpg", jpeg(n)), ("json", text))]
    write_tar(tmp_path / "set" / "1.tar", late)
    assert [row.captions for row in rows_of(tmp_path / "set", tmp_path / "scratch")] == [["1."], ["1.", "2."]]
    late = [(f"{n}.{s}", d) for n in range(300) for s, d in (("jpg", jpeg(0)), ("json", one if n < 290 else two))]
    rows = rows_of(write_tar(tmp_path / "late.tar", late), tmp_path / "scratch")
    assert sum("2 captions, but the first 256 samples have one" in str(row.problem) for row in rows) == 10


def test_links_in_tars_are_read_or_reported(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content, kind, target in [
            *[("a.jpg", jpeg(1), tarfile.REGTYPE, ""), ("a.txt", b"A.", tarfile.REGTYPE, "")],
            *[("b.jpg", b"", tarfile.LNKTYPE, "a.jpg"), ("b.txt", b"B.", tarfile.REGTYPE, "")],
            *[("c.jpg", b"", tarfile.SYMTYPE, "c.jpg"), ("c.txt", b"C.", tarfile.REGTYPE, "")],
        ]:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, target
            tar.addfile(info, io.BytesIO(content))
    a, b, c = rows_of(tmp_path / "x.tar", tmp_path / "scratch")
    assert (b.image, b.captions, a.problem, b.problem) == (jpeg(1), ["B."], None, None)
    assert "'c.jpg' is a link to 'c.jpg', which is not a file of the tar" in str(c.problem)


def test_folder_with_annotations_only_names_the_file_to_give(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_lines(tmp_path / "rows.jsonl", [{"image": "a.jpg", "caption": "x"}])
    with pytest.raises(DataError, match=r"give that file: --set input=.*rows\.jsonl"):
        rows_of(tmp_path, tmp_path / "scratch")
    with pytest.raises(ConfigError, match=r"source.keep does not apply to jsonl, only to parquet"):
        rows_of(tmp_path / "rows.jsonl", tmp_path / "scratch", keep=["x"])
