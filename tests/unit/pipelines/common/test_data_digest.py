"""The identity of a data set: that of its manifest, as long as the manifest is true."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.common.data_digest import DataDigest, data_digest
from pipelines.common.parquet_set import MANIFEST, open_parquet
from pipelines.common.storage import Storage


def write(path: Path, rows: int, name: str = "id") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: [str(row) for row in range(rows)]}), path)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A set with two splits and a manifest, as prepare writes it."""
    root = tmp_path / "clean"
    files = {"train/a.parquet": 3, "train/b.parquet": 2, "val/a.parquet": 2, "train/empty.parquet": 0}
    for name, rows in files.items():
        write(root / name, rows)
    listed = [{"name": name, "rows": rows, "bytes": (root / name).stat().st_size} for name, rows in files.items()]
    (root / MANIFEST).write_text(json.dumps({"files": listed, "splits": {"train": 5, "val": 2}}))
    return root


def digest(path: Path, split: str = "train") -> DataDigest:
    return data_digest("input", open_parquet("input", str(path), Storage(), [], split=split))


def test_the_digest_is_that_of_the_manifest_file(prepared: Path) -> None:
    expected = hashlib.sha256((prepared / MANIFEST).read_bytes()).hexdigest()[:16]
    for path, split, name in (
        (prepared, "train", "train"),
        (prepared / "train", "train", "train"),
        (prepared, "val", "val"),
    ):
        found = digest(path, split)
        assert (found.name, found.digest, found.of) == (f"clean/{name}", expected, "manifest")
        assert found.manifest["splits"] == {"train": 5, "val": 2}


@pytest.mark.parametrize("change", ["more rows", "a file more", "a file less", "other content"])
def test_a_manifest_that_is_not_true_is_not_used(
    prepared: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if change == "more rows":
        write(prepared / "train" / "a.parquet", 4)
    elif change == "a file more":
        write(prepared / "train" / "c.parquet", 1)
    elif change == "a file less":
        (prepared / "train" / "b.parquet").unlink()
    else:
        write(prepared / "train" / "a.parquet", 3, name="identifier")
    found = digest(prepared)
    assert (found.of, found.manifest) == ("files", {})
    assert "_manifest.json does not list the files that are there" in capsys.readouterr().err


def test_part_of_a_set_is_not_the_set(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digest(prepared / "train" / "a.parquet").of == "files"
    assert capsys.readouterr().err == ""


def test_files_without_a_manifest_are_told_apart(tmp_path: Path) -> None:
    digests = set()
    for name, rows, column in (("a", 2, "id"), ("b", 2, "id"), ("a", 3, "id"), ("a", 2, "key")):
        write(tmp_path / f"{rows}{column}" / f"{name}.parquet", rows, column)
        digests.add(digest(tmp_path / f"{rows}{column}").digest)
    assert len(digests) == 4
    write(tmp_path / "copy" / "a.parquet", 3)
    write(tmp_path / "other" / "a.parquet", 3)
    assert digest(tmp_path / "copy").digest == digest(tmp_path / "other").digest
    assert digest(tmp_path / "copy").of == "files"
