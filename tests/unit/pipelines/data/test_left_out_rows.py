"""What prepare leaves out, and what it keeps: equal ids, duplicates, evaluation sets, and samples in the report."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prepare
from pipelines.data.sources.parquet import ParquetSource
from tests.support.broken_rows import jpeg
from tests.support.in_process import manifest, output_rows, quarantined, run_job, without_ray
from tests.support.layouts import docci, sharegpt4v, urban1k, write_lines

Prepare = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Prepare:
    """Prepare `in` into `out` with further settings; returns the exit code."""
    without_ray(monkeypatch)
    return lambda *settings: run_job(prepare.main, f"input={tmp_path}/in", f"output={tmp_path}/out", *settings)


def shard(path: Path, ids: list[Any], seeds: list[int], **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": ids, "image": [jpeg(seed) for seed in seeds], "caption": ["A caption."] * len(ids)} | columns
    pq.write_table(pa.table(table), path)
    return path


def ids(output: Path) -> list[str]:
    return [row["id"] for row in output_rows(output)]


@pytest.mark.parametrize("deduplicate", ["image", "none"])
def test_rows_of_equal_ids_and_different_images_are_all_kept(run: Prepare, tmp_path: Path, deduplicate: str) -> None:
    shard(tmp_path / "in" / "a.parquet", ["0", "1", "b/0", "0"], [0, 1, 2, 3])
    shard(tmp_path / "in" / "b.parquet", ["0", "1", "0"], [4, 5, 6])
    assert run(f"deduplicate={deduplicate}", "source.rows_per_piece=2") == 0
    assert ids(tmp_path / "out") == ["0", "1", "b/0", "a/0", "b/0-2", "b/1", "b/0-3"]
    assert [row["image"] for row in output_rows(tmp_path / "out")] == [jpeg(seed) for seed in range(7)]
    assert manifest(tmp_path / "out")["new_ids"] == 4


def test_new_ids_are_those_of_the_rows_behind_row_groups_and_dropped_rows(run: Prepare, tmp_path: Path) -> None:
    shard(tmp_path / "in" / "a.parquet", [f"{n}" for n in range(300)], list(range(300)))
    shard(tmp_path / "in" / "b.parquet", [f"{n}" for n in range(300)], [0] * 150 + list(range(300, 450)))
    assert run() == 0
    rows = output_rows(tmp_path / "out")
    assert {row["id"]: row["image"] for row in rows} == {f"{n}": jpeg(n) for n in range(300)} | {
        f"b/{n}": jpeg(n + 150) for n in range(150, 300)
    }
    assert manifest(tmp_path / "out")["counts"]["duplicates"] == 150


def test_same_id_and_image_is_a_duplicate_that_names_its_file(run: Prepare, tmp_path: Path) -> None:
    shard(tmp_path / "in" / "a.parquet", ["0", "0"], [0, 1])
    shard(tmp_path / "in" / "b.parquet", ["0", "x"], [1, 1])
    assert run() == 0
    refused = [(row["id"], row["source"], row["reason"]) for row in quarantined(tmp_path / "out")]
    source = f"{tmp_path}/in: b"
    assert refused == [("0", source, "same image as 'a/0'"), ("x", source, "same image as 'a/0'")]


def test_first_command_of_the_documentation_leaves_out_what_overlaps(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    sharegpt4v(tmp_path / "set").rename(tmp_path / "in")  # images a, b and c
    urban1k(tmp_path / "urban1k")
    (tmp_path / "urban1k" / "image" / "c.jpg").write_bytes(jpeg(99))
    assert (
        run(
            f"source.images={tmp_path}/set/images",
            f"exclude_overlap_with={tmp_path}/urban1k",
            "source.format=sharegpt4v",
            "image.short_side=288",
        )
        == 0
    )
    assert ids(tmp_path / "out") == ["coco/c.jpg"]
    assert "left out 0 duplicates and 2 rows of evaluation sets (urban1k 2)" in capsys.readouterr().out
    assert manifest(tmp_path / "out")["overlapping"] == {"urban1k": 2}
    assert "in evaluation set urban1k" in (tmp_path / "out" / "_report.html").read_text()


def test_evaluation_sets_have_their_own_source(run: Prepare, tmp_path: Path) -> None:
    shard(tmp_path / "in" / "a.parquet", ["0", "1", "2"], [1, 2, 50], words=["x"] * 3)
    (tmp_path / "docci").mkdir()
    path = docci(tmp_path / "docci")
    (tmp_path / "docci" / "images").rename(tmp_path / "photographs")
    shard(tmp_path / "plain.parquet", ["0"], [2])
    settings = ["source.caption=words", f"exclude_overlap_with.docci.input={path}"]
    assert run(*settings) == 3
    settings += [f"exclude_overlap_with.docci.source.images={tmp_path}/photographs"]
    assert run(*settings, f"exclude_overlap_with.plain={tmp_path}/plain.parquet", "overwrite=true") == 0
    assert manifest(tmp_path / "out")["overlapping"] == {"docci": 2, "plain": 0}


@pytest.mark.parametrize(
    ("images", "accepted", "expected"),
    [
        (["a.jpg", "gone.jpg"], 0.4, "1 of 2 images cannot be read, more than max_unreadable_fraction=0.4 allows"),
        (["a.jpg", "gone.jpg"], 0.5, None),
        (["gone.jpg"], 1, "1 of 1 images cannot be read"),
        (["https://example.org/a.jpg"] * 2, 0, "2 of 2 images cannot be read"),
    ],
)
def test_evaluation_set_that_cannot_be_read_ends_the_job(
    run: Prepare,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    images: list[str],
    accepted: float,
    expected: str | None,
) -> None:
    shard(tmp_path / "in" / "a.parquet", ["0", "1"], [1, 2])
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    path = write_lines(tmp_path / "e.jsonl", [{"id": name, "image": name} for name in images])
    group = "exclude_overlap_with.mine"
    code = run(f"{group}.input={path}", f"{group}.source.format=jsonl", f"{group}.max_unreadable_fraction={accepted}")
    error = capsys.readouterr().err
    if expected is None:
        assert (code, ids(tmp_path / "out")) == (0, ["1"]), "captions of evaluation sets do not matter"
        return
    assert code == 3
    assert error.startswith(f"error: {group}.input='{path}'")
    assert len(error.splitlines()) == 1
    assert expected in error
    assert not (tmp_path / "out").exists()


def test_report_shows_samples_of_rejected_rows(run: Prepare, tmp_path: Path) -> None:
    captions = ["Fine."] * 7 + [None, " ", "<b>Broken.</b>"]
    images = [jpeg(seed) for seed in range(9)] + [b"broken"]
    shard(tmp_path / "in" / "a.parquet", [f"row-{n}" for n in range(10)], [], caption=captions, image=images)
    assert run("max_rejected_fraction=1") == 0
    report = (tmp_path / "out" / "_report.html").read_text()
    samples = report.partition("Samples of rows that were left out")[2].partition("Samples, evenly spread")[0]
    for text in ("row-7", "row-8", "row-9", "caption is missing", "caption is empty", "&lt;b&gt;Broken.&lt;/b&gt;"):
        assert text in samples
    assert samples.count("data:image/jpeg;base64,") == 2
    assert samples.count("no image that can be read") == 1


def test_storage_that_fails_while_reading_is_an_error_of_the_input(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")
        yield

    monkeypatch.setattr(ParquetSource, "read", fail)
    path = shard(tmp_path / "in" / "a.parquet", ["0"], [1])
    assert run() == 3
    assert capsys.readouterr().err == f"error: input='{path}' cannot be used: [Errno 5] Input/output error\n"
