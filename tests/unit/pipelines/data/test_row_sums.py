"""Whatever the rows are, prepare accounts for each of them: rows in = rows out + rejected + left out by name."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import prepare
from tests.support.broken_rows import BROKEN_IMAGES, jpeg, png_header
from tests.support.in_process import manifest, output_rows, quarantined, run_job, without_ray

OVERLAPPING = [jpeg(seed) for seed in (100, 101)]
IMAGES = [jpeg(seed) for seed in range(5)]
BROKEN = [b"", b"<html>", jpeg(1)[:900], png_header(30_000, 30_000), BROKEN_IMAGES["spacer"][0](1), None]
NOT_UTF8 = [b"caf\xe9", b"\xffA", b"ok \xed\xa0\xbd half a pair"]

# Bytes with NUL characters are taken for UTF-16, and a byte-order mark at the start is not a part of the text.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=40)
GOOD_CAPTION = TEXTS.filter(str.strip).map(str.encode)
IDS = st.sampled_from([b"a", b"b", b"file-1/a", b"file-1/a-2", b"", None])
ROWS = st.one_of(
    st.tuples(IDS, st.sampled_from(IMAGES), GOOD_CAPTION),
    st.tuples(IDS, st.sampled_from(OVERLAPPING), GOOD_CAPTION),
    st.tuples(IDS, st.sampled_from(BROKEN), GOOD_CAPTION),
    st.tuples(IDS, st.sampled_from(IMAGES), st.sampled_from([b"", b" \n", None, *NOT_UTF8])),
    st.tuples(st.sampled_from(NOT_UTF8), st.sampled_from(IMAGES), GOOD_CAPTION),
)


@pytest.fixture(scope="module", autouse=True)
def no_ray() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        yield


def normalized(caption: bytes) -> str:
    return " ".join(caption.decode().split())


def write(path: Path, rows: list[Any], as_text: bool, group: int) -> None:
    kind = pa.string() if as_text else pa.binary()
    columns = {
        "id": pa.array([row[0] for row in rows], pa.binary()).view(kind),
        "image": pa.array([row[1] for row in rows], pa.binary()),
        "caption": pa.array([row[2] for row in rows], pa.binary()).view(kind),
    }
    pq.write_table(pa.table(columns), path, row_group_size=group)


def is_good(row: Any) -> bool:
    try:
        (row[0] or b"").decode()
        return row[1] in IMAGES and bool(normalized(row[2] or b""))
    except UnicodeDecodeError:
        return False


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    files=st.lists(st.lists(ROWS, max_size=6), min_size=1, max_size=3),
    texts=st.lists(st.booleans(), min_size=3, max_size=3),
    group=st.sampled_from([1, 2, 50]),
    deduplicate=st.sampled_from(["image", "row", "none"]),
    val_fraction=st.sampled_from([0, 0.5]),
)
def test_rows_in_are_rows_out_rejected_or_left_out_by_name(
    files: list[list[Any]], texts: list[bool], group: int, deduplicate: str, val_fraction: float
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder, output = Path(directory, "in"), Path(directory, "out")
        folder.mkdir()
        for number, rows in enumerate(files):
            write(folder / f"file-{number}.parquet", rows, texts[number], group)
        evaluation = [(b"e", image, b"x") for image in OVERLAPPING]
        write(Path(directory, "evaluation.parquet"), evaluation, as_text=True, group=1)
        code = run_job(
            prepare.main,
            *(f"input={folder}", f"output={output}", f"deduplicate={deduplicate}", f"val_fraction={val_fraction}"),
            *("source.rows_per_piece=2", "max_rejected_fraction=1"),
            f"exclude_overlap_with.held_out.input={directory}/evaluation.parquet",
        )
        good = [row for rows in files for row in rows if is_good(row)]
        if not good:
            assert code == 3
            return
        assert code == 0
        check(manifest(output), output_rows(output), quarantined(output), good, deduplicate, sum(map(len, files)))


def check(
    summary: dict[str, Any],
    kept: list[dict[str, Any]],
    refused: list[dict[str, Any]],
    good: list[Any],
    deduplicate: str,
    rows: int,
) -> None:
    counts = summary["counts"]
    left_out = counts["rejected"] + counts["overlapping"] + counts["duplicates"]
    assert counts["rows_in"] == rows == counts["rows_out"] + left_out
    assert summary["overlapping"] == {"held_out": counts["overlapping"]}
    assert (len(kept), len(refused)) == (counts["rows_out"], left_out)
    assert all(row["reason"] and row["stage"] and row["source"] for row in refused)
    assert len({row["id"] for row in kept}) == len(kept)
    expected = Counter((row[1], normalized(row[2])) for row in good)
    actual = Counter((row["image"], row["caption"]) for row in kept)
    assert actual <= expected, "texts and images are those of the input"
    if deduplicate == "none":
        assert actual == expected
    elif deduplicate == "row":
        assert actual == Counter(expected.keys())
    else:
        assert set(Counter(image for image, _ in actual.elements()).values()) == {1}
        assert {image for image, _ in actual} == {image for image, _ in expected}
