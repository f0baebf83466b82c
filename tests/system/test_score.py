"""Scores as a job on Ray: several actors, and storage that is not local."""

import math
from pathlib import Path

import pytest

from pipelines import score
from tests.support.in_process import manifest, output_rows, run_job
from tests.support.rows import write_rows

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS = 24


def test_pieces_are_scored_by_actors(tiny_checkpoint_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = write_rows(tmp_path / "rows" / "part.parquet", ROWS, broken=(3,)).parent
    settings = [f"input={source}", f"model={tiny_checkpoint_dir}", f"output={tmp_path}/out", "rows_per_piece=8"]
    settings += ["keep_share=0.5", "max_rejected_fraction=0.1"]
    assert run_job(score.main, *settings) == 0
    kept = math.ceil((ROWS - 1) / 2)
    assert f"score: {ROWS} rows in, {kept} out, 1 rejected" in capfd.readouterr().out
    rows = output_rows(tmp_path / "out")
    assert len(rows) == kept
    assert manifest(tmp_path / "out")["scores"]["clip_score"]["rows"] == ROWS - 1
    assert run_job(score.main, *settings) == 0
    assert "already finished" in capfd.readouterr().out
