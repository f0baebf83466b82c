"""Scores of pairs: equal to the model's own cosines, in the right columns, and what a filter keeps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPModel

from longclip.checkpoint import load_checkpoint
from pipelines import score
from tests.support.in_process import manifest, output_rows, quarantined, run_job, without_ray
from tests.support.pictures import picture
from tests.support.rows import write_rows

ROWS = 12
LONG = " ".join(f"Thing number {number} is next to a small red cup." for number in range(40))
CAPTIONS = [LONG if row == 3 else f"Picture number {row} is here. It has many dots." for row in range(ROWS)]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def run(source: Path, model: Path, output: Path, *settings: str) -> int:
    return run_job(
        score.main,
        f"input={source}",
        f"model={model}",
        f"output={output}",
        "rows_per_piece=5",
        "batch_size=3",
        *settings,
    )


def expected(directory: Path, row: int, text: str) -> float:
    """Cosine by transformers' own forward pass, on one pair."""
    checkpoint = load_checkpoint(directory)
    model = CLIPModel.from_pretrained(directory).eval()
    tokens = checkpoint.tokenizer(text, truncation=True, max_length=248, return_tensors="pt")
    pixels = checkpoint.transform.normalize(torch.from_numpy(checkpoint.transform.pixels(picture(row))[None]))
    with torch.inference_mode():
        output = model(pixel_values=pixels, **tokens)
    return float((normalize(output.image_embeds) * normalize(output.text_embeds)).sum())


def test_scores_are_the_cosines_of_the_model(tiny_checkpoint_dir: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS, caption=CAPTIONS, place=list(range(ROWS)))
    assert run(source, tiny_checkpoint_dir, tmp_path / "out") == 0
    closing = capsys.readouterr().out
    assert f"score: {ROWS} rows in, {ROWS} out, 0 rejected" in closing
    assert f"1 of {ROWS} captions cut at 248 tokens" in closing
    rows = output_rows(tmp_path / "out")
    assert list(rows[0]) == ["id", "image", "caption", "summary", "place", "clip_score", "summary_clip_score"]
    assert [row["place"] for row in rows] == list(range(ROWS))
    for row in (0, 3, 11):
        assert rows[row]["clip_score"] == pytest.approx(expected(tiny_checkpoint_dir, row, CAPTIONS[row]), abs=1e-5)
        assert rows[row]["summary_clip_score"] == pytest.approx(
            expected(tiny_checkpoint_dir, row, f"picture {row}"), abs=1e-5
        )
    assert "Histogram of clip_score" in (tmp_path / "out" / "_report.html").read_text()


def test_clipscore_is_scaled_and_never_negative(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS)
    assert run(source, tiny_checkpoint_dir, tmp_path / "cosine") == 0
    assert run(source, tiny_checkpoint_dir, tmp_path / "paper", "measure=clipscore", "score_column=s") == 0
    cosines, papers = output_rows(tmp_path / "cosine"), output_rows(tmp_path / "paper")
    for name, other in (("clip_score", "s"), ("summary_clip_score", "summary_s")):
        wanted = [2.5 * max(row[name], 0) for row in cosines]
        assert [row[other] for row in papers] == pytest.approx(wanted, abs=1e-6)


def test_a_list_of_captions_has_a_list_of_scores(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    captions = [[f"Picture {row}.", "", "A red cup."][: 1 + row % 3] for row in range(ROWS)]
    summaries = [None if row == 2 else f"picture {row}" for row in range(ROWS)]
    source = write_rows(tmp_path / "rows.parquet", ROWS, caption=captions, summary=summaries)
    assert run(source, tiny_checkpoint_dir, tmp_path / "out") == 0
    rows = output_rows(tmp_path / "out")
    assert [len(row["clip_score"]) for row in rows[:3]] == [1, 1, 2]  # empty texts have no score
    assert rows[2]["clip_score"][1] == pytest.approx(expected(tiny_checkpoint_dir, 2, "A red cup."), abs=1e-5)
    assert rows[2]["summary_clip_score"] is None


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_keeps_the_best(tiny_checkpoint_dir: Path, tmp_path: Path, share: float) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS)
    assert run(source, tiny_checkpoint_dir, tmp_path / "all") == 0
    assert run(source, tiny_checkpoint_dir, tmp_path / "best", f"keep_share={share}") == 0
    ranked = sorted(output_rows(tmp_path / "all"), key=lambda row: -row["clip_score"])[: round(share * ROWS)]
    assert {row["id"] for row in output_rows(tmp_path / "best")} == {row["id"] for row in ranked}
    counts = manifest(tmp_path / "best")["counts"]
    assert counts["rows_in"] == counts["rows_out"] + counts["rejected"] + counts["low_scores"]


def test_a_minimum_leaves_out_and_counts(tiny_checkpoint_dir: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS)
    assert run(source, tiny_checkpoint_dir, tmp_path / "all") == 0
    scores = sorted(row["clip_score"] for row in output_rows(tmp_path / "all"))
    limit = float(np.mean(scores[3:5]))
    assert run(source, tiny_checkpoint_dir, tmp_path / "some", f"min_score={limit}") == 0
    assert "4 left out for their score" in capsys.readouterr().out
    assert sorted(row["clip_score"] for row in output_rows(tmp_path / "some")) == scores[4:]
    assert run(source, tiny_checkpoint_dir, tmp_path / "none", "min_score=2") == 3
    assert "min_score=2.0 leaves no row: the highest score is" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_bad_rows_are_rejected_with_their_reason(tiny_checkpoint_dir: Path, tmp_path: Path, capsys: Any) -> None:
    captions = [" " if row == 5 else caption for row, caption in enumerate(CAPTIONS)]
    text = pa.array([caption.encode() if row != 7 else b"\xff\xfe" for row, caption in enumerate(captions)])
    source = write_rows(tmp_path / "rows.parquet", ROWS, broken=(4,), caption=text.cast(pa.string(), safe=False))
    assert run(source, tiny_checkpoint_dir, tmp_path / "out") == 3
    assert "max_rejected_fraction=0.01" in capsys.readouterr().err
    assert run(source, tiny_checkpoint_dir, tmp_path / "out", "max_rejected_fraction=0.5") == 0
    reasons = {row["id"]: row["reason"] for row in quarantined(tmp_path / "out")}
    assert set(reasons) == {"row-004", "row-005", "row-007"}
    assert reasons["row-005"] == "column 'caption' has no text"
    assert "UTF-8" in reasons["row-007"]
    ids = [row["id"] for row in output_rows(tmp_path / "out")]
    assert ids == [f"row-{row:03d}" for row in range(ROWS) if row not in (4, 5, 7)]


def test_scores_that_are_there_are_not_replaced(tiny_checkpoint_dir: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS, clip_score=[0.5] * ROWS)
    assert run(source, tiny_checkpoint_dir, tmp_path / "out") == 2
    assert "has a column 'clip_score' already" in capsys.readouterr().err


def test_a_second_run_has_nothing_to_do_unless_the_model_changed(
    tiny_checkpoint_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS)
    model = tmp_path / "model"
    checkpoint = load_checkpoint(tiny_checkpoint_dir)
    checkpoint.model.save_pretrained(model)
    assert run(source, model, tmp_path / "out") == 0
    assert run(source, model, tmp_path / "out", "batch_size=2") == 0
    assert "already finished" in capsys.readouterr().out
    with torch.no_grad():
        checkpoint.model.logit_scale.add_(1)
    checkpoint.model.save_pretrained(model)
    assert run(source, model, tmp_path / "out") == 2
    assert "other settings (model=" in capsys.readouterr().err


def test_two_filters_are_refused(tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path, tmp_path, tmp_path / "out", "min_score=0.2", "keep_share=0.5") == 2
    assert "min_score and keep_share are both set" in capsys.readouterr().err


def test_the_manifest_has_the_figures(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.parquet", ROWS)
    assert run(source, tiny_checkpoint_dir, tmp_path / "out") == 0
    values = np.array([row["clip_score"] for row in output_rows(tmp_path / "out")])
    document = manifest(tmp_path / "out")
    assert document["scores"]["clip_score"]["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert json.dumps(document["files"])
    assert sum(file["rows"] for file in document["files"]) == pq.read_table(source).num_rows
