"""From what people have to clean training Parquet: what is kept, what is left out and why, and what it looks like."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from longclip.images import decode_image
from pipelines import finetune, prepare
from pipelines.common.entry import run_entry
from tests.support.broken_rows import BROKEN_CAPTIONS, BROKEN_IMAGES, ODD_IMAGES, encoded, jpeg, photograph

Run = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Prepare with settings; gives its exit code, standard output and standard error."""

    def run_settings(*arguments: str) -> tuple[int, str, str]:
        options = [part for text in arguments for part in (("--set", text) if text[0] != "-" else (text,))]
        with pytest.raises(SystemExit) as left:
            run_entry(lambda: prepare.main(options))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run_settings


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"id": pa.string(), "image": pa.binary()}
    names = list(rows[0])
    schema = [(name, kinds.get(name) or pa.array([row[name] for row in rows]).type) for name in names]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema)), path, **options)
    return path


def plain_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"row-{seed:04d}", "image": jpeg(seed), "caption": f"Photograph {seed}.\nIt has  colours."}
        for seed in range(start, start + count)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(path.rglob("[!_]*.parquet")) for row in pq.read_table(file).to_pylist()]


def quarantine(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path / "_quarantine.parquet").to_pylist()


def test_prepared_set_has_data_manifest_and_report(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.parquet", plain_rows(300), row_group_size=50)
    code, out, _ = run(f"input={source.parent}", f"output={tmp_path}/out", "source.rows_per_piece=100")
    assert code == 0
    assert "prepare: 300 rows in, 300 out, 0 rejected" in out
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"row-{seed:04d}" for seed in range(300)]
    assert rows[7]["caption"] == "Photograph 7. It has colours."
    assert rows[7]["image"] == jpeg(7)
    assert (rows[7]["width"], rows[7]["height"]) == (96, 80)
    assert rows[7]["sha256"] == hashlib.sha256(jpeg(7)).hexdigest()
    assert len(rows[7]["phash"]) == 16
    assert rows[7]["caption_tokens"] == 9
    (file,) = (tmp_path / "out" / "train").glob("*.parquet")
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [128, 128, 44]
    image = metadata.row_group(0).column(metadata.schema.names.index("image"))
    assert image.compression == "UNCOMPRESSED"
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["counts"] == {"rows_in": 300, "rejected": 0, "overlapping": 0, "duplicates": 0, "rows_out": 300}
    assert manifest["splits"] == {"train": 300}
    assert [(line["name"], line["sha256"]) for line in manifest["files"]] == [
        ("train/part-00000.parquet", hashlib.sha256(file.read_bytes()).hexdigest())
    ]
    assert manifest["settings"]["input"] == str(source.parent)
    assert "Photograph 299" in (tmp_path / "out" / "_report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_broken_rows_are_counted_with_their_reasons_and_odd_ones_kept(run: Run, tmp_path: Path) -> None:
    broken: list[tuple[str, bytes | None, str | None, str]] = [
        (kind, data(number), "A caption.", part) for number, (kind, (data, part)) in enumerate(BROKEN_IMAGES.items())
    ]
    broken += [
        (kind, jpeg(900 + number), caption, part)
        for number, (kind, (caption, part)) in enumerate(BROKEN_CAPTIONS.items())
    ]
    assert len(broken) >= 12
    odd = [{"id": kind, "image": data(500), "caption": "Odd."} for kind, data in ODD_IMAGES.items()]
    rows = plain_rows(20 * len(broken) - len(broken) - len(odd)) + odd  # one row of twenty is broken
    for number, (kind, data, caption, _) in enumerate(broken):
        rows.insert(19 * number, {"id": kind, "image": data, "caption": caption})
    source = write(tmp_path / "in.parquet", rows, row_group_size=64)
    settings = [f"input={source}", f"output={tmp_path}/out", "source.rows_per_piece=64", "deduplicate=none"]
    code, out, _ = run(*settings)
    assert code == 0, out
    assert f"prepare: {len(rows)} rows in, {len(rows) - len(broken)} out, {len(broken)} rejected" in out
    refused = {row["id"]: row for row in quarantine(tmp_path / "out")}
    assert refused.keys() == {kind for kind, *_ in broken}
    for kind, _, _, part in broken:
        assert part in refused[kind]["reason"], kind
        assert refused[kind]["source"] == str(source)
        assert refused[kind]["stage"] in ("read", "image", "caption")
    kept = {row["id"]: row for row in read(tmp_path / "out")}
    assert kept.keys() == {row["id"] for row in rows} - refused.keys()
    assert (kept["rotated"]["width"], kept["rotated"]["height"]) == (80, 96)
    report = (tmp_path / "out" / "_report.html").read_text()
    assert "cannot be decoded" in report


def test_too_many_rejected_rows_fail_the_job_and_a_higher_limit_finishes_it(run: Run, tmp_path: Path) -> None:
    rows = plain_rows(40)
    for row in rows[:4]:
        row["image"] = b"broken"
    source = write(tmp_path / "in.parquet", rows)
    settings = [f"input={source}", f"output={tmp_path}/out"]
    code, _, err = run(*settings)
    assert code == 3
    (line,) = err.splitlines()
    assert "4 of 40 rows rejected, more than max_rejected_fraction=0.05 allows; the first is 'row-0000'" in line
    assert not (tmp_path / "out").exists()
    code, out, _ = run(*settings, "max_rejected_fraction=0.1")
    assert code == 0
    assert "1 of 1 pieces of 'clean' are already finished" in out
    assert "40 rows in, 36 out, 4 rejected" in out


def test_a_second_run_has_nothing_to_do(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", plain_rows(10))
    settings = [f"input={source}", f"output={tmp_path}/out"]
    assert run(*settings)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, out, _ = run(*settings)
    assert code == 0
    assert "10 rows in, 10 out, 0 rejected" in out
    assert "already finished, nothing to do" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    code, _, err = run(*settings, "image.short_side=32")
    assert code == 2
    assert "finished, but was made with other settings (image.short_side=None)" in err


def test_duplicates_are_dropped_and_counted(run: Run, tmp_path: Path) -> None:
    rows = plain_rows(30)
    rows[20] = {"id": "again", "image": rows[3]["image"], "caption": "Another caption."}
    rows[25] = rows[5] | {"id": "copy"}
    rows[28] = rows[28] | {"id": "row-0001"}
    source = write(tmp_path / "in.parquet", rows, row_group_size=7)
    settings = [f"input={source}", "source.rows_per_piece=7"]
    code, out, _ = run(*settings, f"output={tmp_path}/image")
    assert code == 0
    assert "30 rows in, 28 out, 0 rejected" in out
    assert "2 duplicates" in out
    reasons = {(row["id"], row["reason"]) for row in quarantine(tmp_path / "image")}
    assert reasons == {
        ("again", "same image as 'row-0003'"),
        ("copy", "same image as 'row-0005'"),
    }
    assert [row["id"] for row in read(tmp_path / "image")][-2:] == ["in/row-0001", "row-0029"]
    assert run(*settings, f"output={tmp_path}/row", "deduplicate=row")[0] == 0
    assert {row["id"] for row in quarantine(tmp_path / "row")} == {"copy"}
    assert run(*settings, f"output={tmp_path}/none", "deduplicate=none")[0] == 0
    assert quarantine(tmp_path / "none") == []


def test_split_depends_only_on_the_image(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", plain_rows(200), row_group_size=30)
    other = write(tmp_path / "other.parquet", [row | {"id": f"x{row['id']}"} for row in plain_rows(100)[::-1]])
    assert run(f"input={source}", f"output={tmp_path}/out", "val_fraction=0.2", "source.rows_per_piece=30")[0] == 0
    assert run(f"input={other}", f"output={tmp_path}/other", "val_fraction=0.2")[0] == 0
    val = {row["sha256"] for row in read(tmp_path / "out" / "val")}
    train = {row["sha256"] for row in read(tmp_path / "out" / "train")}
    assert len(val) + len(train) == 200
    assert not val & train
    assert 20 <= len(val) <= 60
    assert {row["sha256"] for row in read(tmp_path / "other" / "val")} <= val
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["splits"] == {"train": len(train), "val": len(val)}


def test_images_of_evaluation_sets_are_left_out(run: Run, tmp_path: Path) -> None:
    rows = plain_rows(30)
    evaluation = [rows[4] | {"id": "same file"}]
    evaluation += [{"id": "same picture", "image": encoded(photograph(9), "PNG"), "caption": "x"}]
    smaller = encoded(photograph(11).resize((64, 53)), quality=80)
    evaluation += [{"id": "smaller", "image": smaller, "caption": "x"}]
    evaluation += [{"id": "unreadable", "image": b"broken", "caption": "x"}]
    source, others = write(tmp_path / "in.parquet", rows), write(tmp_path / "evaluation.parquet", evaluation)
    settings = [f"input={source}", f"output={tmp_path}/out", f"exclude_overlap_with.mine.input={others}"]
    code, _, err = run(*settings)
    assert code == 3
    assert "exclude_overlap_with.mine.input" in err
    assert "1 of 4 images cannot be read" in err
    code, out, _ = run(*settings, "exclude_overlap_with.mine.max_unreadable_fraction=0.25")
    assert code == 0
    assert "30 rows in, 27 out, 0 rejected" in out
    assert "left out 0 duplicates and 3 rows of evaluation sets (mine 3)" in out
    refused = quarantine(tmp_path / "out")
    assert {(row["id"], row["stage"]) for row in refused} == {(f"row-{seed:04d}", "overlap") for seed in (4, 9, 11)}


def test_images_are_resized_on_request_and_small_ones_kept(run: Run, tmp_path: Path) -> None:
    rows = plain_rows(3)
    rows[1]["image"] = encoded(photograph(1, (640, 400)))
    rows[2]["image"] = encoded(photograph(2, (300, 200)).convert("RGBA"), "PNG")
    source = write(tmp_path / "in.parquet", rows)
    assert run(f"input={source}", f"output={tmp_path}/out", "image.short_side=100")[0] == 0
    kept = read(tmp_path / "out")
    assert kept[0]["image"] == rows[0]["image"]
    sizes = [Image.open(io.BytesIO(row["image"])).size for row in kept]
    assert sizes == [(row["width"], row["height"]) for row in kept] == [(96, 80), (160, 100), (150, 100)]
    assert all(Image.open(io.BytesIO(row["image"])).format == "JPEG" for row in kept)
    assert kept[1]["sha256"] == hashlib.sha256(rows[1]["image"]).hexdigest()
    before, after = decode_image(rows[1]["image"]).resize((160, 100)), decode_image(kept[1]["image"])
    difference = [abs(a - b) for a, b in zip(before.tobytes(), after.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 2


def test_lists_of_captions_and_further_columns_are_kept(run: Run, tmp_path: Path) -> None:
    rows = [
        {
            "image_id": seed,
            "jpg": {"bytes": jpeg(seed), "path": "x.jpg"},
            "captions": ["One.", " ", "Two."],
            "score": seed / 2,
        }
        for seed in range(5)
    ]
    source = write(tmp_path / "in.parquet", rows)
    assert run(f"input={source}", f"output={tmp_path}/out", "source.keep=[score]")[0] == 0
    kept = read(tmp_path / "out")
    assert [row["caption"] for row in kept] == [["One.", "Two."]] * 5
    assert [row["score"] for row in kept] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [row["id"] for row in kept] == list("01234")


def test_files_are_filled_evenly_to_the_target(run: Run, tmp_path: Path) -> None:
    rows = plain_rows(40)
    for row in rows:
        row["image"] += bytes(100_000)
    source = write(tmp_path / "in.parquet", rows, row_group_size=10)
    settings = [f"input={source}", f"output={tmp_path}/out", "file_megabytes=1", "source.rows_per_piece=10"]
    assert run(*settings)[0] == 0
    files = json.loads((tmp_path / "out" / "_manifest.json").read_text())["files"]
    assert len(files) == 4
    assert all(abs(line["rows"] - 10) <= 1 for line in files)
    assert [row["id"] for row in read(tmp_path / "out")] == [row["id"] for row in rows]


def test_error_without_usable_rows_gives_the_reasons(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", [row | {"image": b"x"} for row in plain_rows(3)])
    code, _, err = run(f"input={source}", f"output={tmp_path}/out", "max_rejected_fraction=1")
    assert code == 3
    assert "none of 3 rows is left: 3 are unusable, the first 'row-0000': image of 1 bytes cannot be decoded" in err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["input={dir}/none", "output={dir}/out"], 3, "input='{dir}/none' does not exist"),
        (["input={rows}"], 2, "setting 'output' is missing"),
        (["input={rows}", "output={dir}/out", "val_fraction=1.5"], 2, "setting 'val_fraction' = '1.5'"),
        (["input={rows}", "output={dir}/out", "deduplicate=maybe"], 2, "setting 'deduplicate' = 'maybe'"),
        (["input={rows}", "output={dir}/out", "exclude_overlaps=x"], 2, "did you mean 'exclude_overlap_with'?"),
        (
            ["input={rows}", "output={dir}/out", "--verbose"],
            2,
            "unknown option '--verbose'; settings are given as",
        ),
        (["input={rows}", "output=xyz://out"], 2, "protocol 'xyz' cannot be used"),
    ],
)
def test_user_errors_are_one_line(run: Run, tmp_path: Path, arguments: list[str], code: int, expected: str) -> None:
    places = {"dir": tmp_path, "rows": write(tmp_path / "rows.parquet", plain_rows(2))}
    actual, _, err = run(*[argument.format(**places) for argument in arguments])
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected.format(**places) in lines[0]
    assert actual == code


def test_training_refuses_a_set_that_is_being_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "out" / "train" / "a.parquet", plain_rows(2))
    (tmp_path / "out" / "_INCOMPLETE").touch()
    settings = [f"input={tmp_path}/out", "loss.summary_loss_weight=0", "model.architecture={}"]
    with pytest.raises(SystemExit) as left:
        run_entry(lambda: finetune.main([part for text in settings for part in ("--set", text)]))
    assert left.value.code == 3
    assert "is incomplete" in capsys.readouterr().err


def test_reasons_of_the_report_are_grouped(run: Run, tmp_path: Path) -> None:
    rows = plain_rows(60)
    for row, size in zip(rows, (40, 50, 60), strict=False):
        row["image"] = row["image"][:size]
    source = write(tmp_path / "in.parquet", rows)
    assert run(f"input={source}", f"output={tmp_path}/out")[0] == 0
    counts = Counter(row["stage"] for row in quarantine(tmp_path / "out"))
    assert counts == {"image": 3}
    report = (tmp_path / "out" / "_report.html").read_text()
    table, _, samples = report.partition("Samples of rows that were left out")
    assert table.count("cannot be decoded") == 1
    assert samples.count("cannot be decoded") == 2
