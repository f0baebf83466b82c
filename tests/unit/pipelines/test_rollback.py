"""Rollback without a registry: it says so and creates nothing."""

from pathlib import Path

import pytest

from longclip.errors import ConfigError
from pipelines import rollback


@pytest.mark.parametrize("is_file", [False, True])
def test_rollback_without_a_database_creates_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory = tmp_path / "typo"
    if is_file:
        directory.touch()
    before = list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"directory='.*typo' has no registry \(mlflow.db\)"):
        rollback.main(["--set", f"directory={directory}"])
    assert list(tmp_path.iterdir()) == before
