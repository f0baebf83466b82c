"""A full disk: jobs report it in one line, readers keep the old version, and the same command finishes later."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longclip.checkpoint import load_checkpoint
from longclip.errors import CheckpointError, DiskFullError
from longclip.index import PublishedIndex, version_directory, version_manifests
from pipelines import embed, finetune, prepare, register
from pipelines.common.entry import run_entry
from serving.model_source import open_model
from tests.support.rows import write_rows

pytestmark = pytest.mark.slow

ROOM = 8 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 MiB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", place]).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def full_but_for(disk: Path, room: int) -> Iterator[None]:
    """Fill a disk except for `room` bytes while the block runs."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room)
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def run(ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an entry; returns its last line, and checks that a full disk is an error of one line."""

    def run_settings(main: Callable[[list[str]], None], *settings: str, full: bool = False) -> str:
        with pytest.raises(SystemExit) as exited:
            run_entry(lambda: main([part for setting in settings for part in ("--set", setting)]))
        out, err = capsys.readouterr()
        if not full:
            assert exited.value.code == 0, err
            return out.strip().splitlines()[-1]
        assert exited.value.code == DiskFullError.exit_code
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "No space left on device" in line
        assert line.endswith("free some space and run the same command again")
        return line

    return run_settings


def test_index_keeps_its_version_and_is_finished_by_a_rerun(
    disk: Path, run: Callable[..., str], tmp_path: Path, tiny_checkpoint_dir: Path
) -> None:
    index = disk / "index"
    settings = [f"model={tiny_checkpoint_dir}", f"output={index}", f"cache={tmp_path}/cache", "commit_rows=64"]
    few, many = (write_rows(tmp_path / f"{rows}.parquet", rows=rows) for rows in (20, 400))
    run(embed.main, f"input={few}", *settings)
    with full_but_for(disk, 2**19):
        run(embed.main, f"input={many}", *settings, full=True)
        assert [manifest.count for manifest in version_manifests(index)] == [20]
        assert len(PublishedIndex.open(version_directory(index, 1)).shards[0]) == 20
    line = run(embed.main, f"input={many}", *settings)
    assert int(line.split(" unchanged")[0].split()[-1]) > 20, "committed rows are not embedded again"
    assert PublishedIndex.open(version_directory(index, 2)).manifest.count == 400
    assert not [path for path in index.rglob("*") if path.name.startswith(".")]


def test_prepared_data_is_never_published_incomplete(disk: Path, run: Callable[..., str], tmp_path: Path) -> None:
    output = disk / "prepared"
    settings = [f"input={write_rows(tmp_path / 'rows.parquet', rows=400)}", f"output={output}"]
    with full_but_for(disk, 2**19):
        run(prepare.main, *settings, full=True)
        assert not (output / "_manifest.json").exists(), "an unfinished output has no manifest"
    assert "400 rows in, 400 out, 0 rejected" in run(prepare.main, *settings)


def test_training_resumes_from_its_last_complete_checkpoint(
    disk: Path, run: Callable[..., str], tmp_path: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray Train takes one report per worker and period; the default of 2 s would be most of the test's time.
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    output = disk / "run"
    settings = [
        f"input={write_rows(tmp_path / 'rows.parquet', rows=32)}", f"model.base={tiny_checkpoint_dir}",
        "model.positions=keep", "optim.per_worker_batch_size=4", "optim.epochs=1", "workers.count=1",
        "loss.allow_small_batch=true", "checkpoints.every_steps=2", "workers.max_failures=1", f"output={output}",
    ]  # fmt: skip
    with full_but_for(disk, ROOM):
        run(finetune.main, *settings, full=True)
        assert not (output / "checkpoint").exists()
    run(finetune.main, *settings)
    load_checkpoint(output / "checkpoint")


def test_failed_download_leaves_the_cache_empty(
    disk: Path, run: Callable[..., str], tmp_path: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint_dir, tmp_path / "checkpoint")
    run(register.main, f"checkpoint={tmp_path}/checkpoint", "alias=champion")
    cache = disk / "cache"
    with full_but_for(disk, 2**20):
        with pytest.raises(CheckpointError, match="No space left on device"):
            open_model("models:/longclip@champion", str(cache))
        assert list(cache.iterdir()) == []
    open_model("models:/longclip@champion", str(cache))
