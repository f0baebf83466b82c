"""Captions as a job, over real HTTP: faults of models and servers, limits, resuming, and what comes out."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import caption
from pipelines.common.entry import run_entry
from tests.support.broken_rows import jpeg
from tests.support.caption_server import CaptionServer
from tests.support.places import ROOT
from tests.support.processes import kill_driver

pytestmark = pytest.mark.usefixtures("ray_cluster")

Run = Callable[..., tuple[int, str, str]]
NOTES = (
    *("fine", "introduced", "limited", "busy", "endless", "endless once", "refused once", "listed once"),
    *("looped once", "german once", "short once", "empty once", "garbled once", "unfinished", None),
    *("refused", "looped", "german", "listed", "short", "nonsense", "rejected", "filtered"),
)
USABLE = 15


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Caption with settings; gives its exit code, standard output and standard error."""

    def run_settings(*settings: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run_entry(lambda: caption.main([part for text in settings for part in ("--set", text)]))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run_settings


def write_source(path: Path, notes: tuple[str | None, ...], **columns: Any) -> Path:
    """Images with a note each, in row groups of 4."""
    rows = {"id": [f"row-{n:02d}" for n in range(len(notes))], "image": [jpeg(n) for n in range(len(notes))]}
    table = pa.table({**rows, "note": pa.array(notes, pa.string()), **columns})
    pq.write_table(table, path, row_group_size=4)
    return path


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    """A prompt that tells the stand-in what to do."""
    path = tmp_path / "prompt.txt"
    path.write_text("Describe the image in {min_words} to {max_words} words, in {language}.\nNote: {note}\n")
    return path


def common_settings(server: CaptionServer, source: Path, output: Path) -> list[str]:
    return [f"input={source}", f"output={output}", f"endpoint.url={server.url}", "endpoint.model=eyes"]


def read(output: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(file) for file in sorted(output.glob("part-*.parquet"))]).to_pylist()


def test_every_fault_ends_as_a_caption_or_in_the_quarantine(
    run: Run, caption_server: CaptionServer, tmp_path: Path, prompt: Path
) -> None:
    source = write_source(tmp_path / "x.parquet", NOTES, text=["A dog."] * 3 + [None] * (len(NOTES) - 3))
    settings = common_settings(caption_server, source, tmp_path / "out")
    settings += [f"prompt={prompt}", "source.keep=[note]", "source.rows_per_piece=4", "max_rejected_fraction=0.5"]
    settings += ["price_per_million={input: 2, output: 10}"]
    code, out, err = run(*settings)
    assert code == 0, err
    rows = {row["note"]: row for row in read(tmp_path / "out")}
    assert list(rows) == list(NOTES[:USABLE])
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    counts = manifest["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rejected"]) == (len(NOTES), USABLE, len(NOTES) - USABLE)
    assert manifest["tokens"]["Captions"]["max"] <= 230
    assert all(row["caption"].startswith("A ") and row["caption"].endswith(".") for row in rows.values())
    assert all(row["image"] == jpeg(n) for n, row in enumerate(rows.values()))
    assert [row["short_caption"] for row in rows.values()] == ["A dog."] * 3 + [None] * (USABLE - 3)
    assert {re.sub("[0-9a-f]{8}", "_", row["caption_source"]) for row in rows.values()} == {"eyes#_"}
    assert (counts["cut"], counts["incomplete_prompts"]) == (2, 1), "endless and unfinished are cut at a sentence"
    quarantine = {
        row["id"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    }
    assert [quarantine[f"row-{n:02d}"].rpartition(": ")[2] for n in range(USABLE, USABLE + 5)] == [
        *("refusal", "repetition", "language", "markup", "too_short")
    ]
    assert "not a chat completion" in quarantine["row-20"]
    assert "400 Bad Request" in quarantine["row-21"]
    assert quarantine["row-22"].endswith("refusal")
    words = Counter[str]()
    for _, _, body in caption_server.requests:
        note = body["messages"][0]["content"][1]["text"].partition("Note: ")[2]
        words[note.partition("\n")[0]] += 1
    assert (words["fine"], words["refused"], words["refused once"], words["limited"], words["rejected"]) == (
        1,
        3,
        2,
        3,
        1,
    )
    told = [body["messages"][-1]["content"] for _, _, body in caption_server.requests if len(body["messages"]) == 3]
    assert any("That is not English." in text for text in told)
    cost = (counts["prompt_tokens"] * 2 + counts["completion_tokens"] * 10) / 1e6
    assert counts["prompt_tokens"] == 100 * counts["replies"]
    assert f"caption: {len(NOTES)} rows in, {USABLE} out, {len(NOTES) - USABLE} rejected" in out
    assert f"{counts['replies']} replies" in out
    assert f"cost {cost:.4g}; " in out
    requests = len(caption_server.requests)
    code, out, _ = run(*settings)
    assert code == 0
    assert "already finished, nothing to do" in out
    assert len(caption_server.requests) == requests


def test_a_killed_job_pays_for_no_row_twice(run: Run, caption_server: CaptionServer, tmp_path: Path) -> None:
    rows, concurrency, key = 100, 4, "sesame-open"
    caption_server.seconds = 0.2
    source = write_source(tmp_path / "x.parquet", ("fine",) * rows)
    settings = [*common_settings(caption_server, source, tmp_path / "out"), f"endpoint.concurrency={concurrency}"]
    settings += ["source.rows_per_piece=40"]
    command = [sys.executable, "pipelines/caption.py", *(part for text in settings for part in ("--set", text))]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["LONGCLIP_LLM_API_KEY"] = key
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 120
    while len(caption_server.requests) < rows // 4:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    kill_driver(process)
    asked = len(caption_server.requests)
    assert asked < rows
    assert {sent for _, sent, _ in caption_server.requests} == {f"Bearer {key}"}
    files = [tmp_path / "log", *(path for path in (tmp_path / ".out.partial").rglob("*") if path.is_file())]
    assert not any(key.encode() in path.read_bytes() for path in files)
    caption_server.seconds = 0.0
    assert not (tmp_path / "out").exists()
    code, out, err = run(*settings)
    assert code == 0, err
    assert len(read(tmp_path / "out")) == rows == len(caption_server.images)
    repeated = [image for image, requests in caption_server.images.items() if requests > 1]
    assert len(repeated) <= concurrency, "only requests in flight are lost"
    assert f"{rows} rows in, {rows} out, 0 rejected" in out
    assert f"; {rows} replies, " in out, "replies of the first run count too"


def test_tokens_and_rows_have_limits(run: Run, caption_server: CaptionServer, tmp_path: Path) -> None:
    source = write_source(tmp_path / "x.parquet", ("fine",) * 24)
    settings = [*common_settings(caption_server, source, tmp_path / "out"), "endpoint.concurrency=2", "limit=18"]
    settings += ["source.rows_per_piece=4"]
    code, _, err = run(*settings, "max_total_tokens=1500")
    assert code == 8
    assert "max_total_tokens=1500 is reached: " in err
    assert "raise max_total_tokens and run the same command again" in err
    asked = len(caption_server.requests)
    assert 1500 / 250 <= asked <= 1500 / 200 + 3
    code, out, err = run(*settings)
    assert code == 0, err
    assert "18 rows in, 18 out, 0 rejected" in out
    assert len(caption_server.requests) == len(caption_server.images) == 18
    assert [row["id"] for row in read(tmp_path / "out")] == [f"row-{n:02d}" for n in range(18)]


def test_a_folder_of_photographs_without_texts(run: Run, caption_server: CaptionServer, tmp_path: Path) -> None:
    folder = tmp_path / "photographs" / "holiday"
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "4.jpg").write_bytes(b"broken")
    settings = common_settings(caption_server, folder.parent, tmp_path / "out")
    code, _, err = run(*settings)
    assert code == 3
    assert "1 of 5 rows rejected, more than max_rejected_fraction=0.05 allows" in err
    assert len(caption_server.requests) == 4, "a broken image costs nothing"
    code, out, err = run(*settings, "max_rejected_fraction=0.2")
    assert (code, "5 rows in, 4 out, 1 rejected" in out) == (0, True), err
    assert len(caption_server.requests) == 4
    rows = read(tmp_path / "out")
    assert [(row["id"], row["short_caption"]) for row in rows] == [(f"holiday/{n}", None) for n in range(4)]
