"""Workspaces: one job at a time holds an output, kills lose no finished work, and publication is atomic."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from longclip.errors import ConfigError, LongClipError
from pipelines.common import lease as lease_module
from pipelines.common.lease import Lease
from pipelines.common.parquet_set import INCOMPLETE, MANIFEST
from pipelines.common.whole_files import whole_file, write_whole
from pipelines.data.workspace import Workspace, claim, partial_path
from tests.support.places import ROOT

IDENTITY: dict[str, Any] = {"job": "test", "settings": {"a": {"b": 1}}, "source": "x"}
OTHER: dict[str, Any] = {"job": "test", "settings": {"a": {"b": 2}}, "source": "x"}


@pytest.fixture(autouse=True)
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 0.6)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.1)


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UPath]:
    """Path of an output that does not exist yet, on a disk and on storage without directories and renaming."""
    if request.param == "local":
        yield UPath(tmp_path / "deep" / "out")
    else:
        path = UPath("memory://bucket/out")
        yield path
        if path.fs.exists("/bucket"):
            path.fs.rm("/bucket", recursive=True)


def names(path: UPath) -> set[str]:
    base = path.path.rstrip("/")
    return {name[len(base) + 1 :] for name in path.fs.find(base)}


def make(output: UPath, identity: dict[str, Any] = IDENTITY, overwrite: bool = False, text: str = "x") -> Workspace:
    with claim(output, identity, overwrite) as work:
        if not work.manifest:
            write_whole(work.tree / "data.parquet", text.encode())
            work.publish({"counts": {"rows_out": 1}})
    return work


def test_publication_is_atomic_and_removes_the_workspace(output: UPath) -> None:
    with claim(output, IDENTITY, overwrite=False) as work:
        write_whole(work.tree / "data.parquet", b"x")
        assert not output.exists()
        work.publish({"counts": {"rows_out": 1}})
    assert names(output) == {"data.parquet", MANIFEST}
    manifest = json.loads((output / MANIFEST).read_bytes())
    assert (manifest["counts"], manifest["identity"]) == ({"rows_out": 1}, IDENTITY)
    assert names(partial_path(output)) == set()


def test_finished_output_is_not_made_twice(output: UPath) -> None:
    make(output, text="first")
    assert make(output, text="second").manifest["counts"] == {"rows_out": 1}
    assert make(output, overwrite=True, text="second").manifest
    assert (output / "data.parquet").read_bytes() == b"first"
    assert names(partial_path(output)) == set()


def test_output_of_other_settings_is_replaced_only_with_overwrite(output: UPath) -> None:
    make(output)
    write_whole(output / "stale.parquet", b"old")
    with pytest.raises(ConfigError, match=r"finished, but was made with other settings \(a.b=1\).*overwrite=true"):
        make(output, OTHER)
    assert (output / "stale.parquet").exists()
    make(output, OTHER, overwrite=True, text="new")
    assert names(output) == {"data.parquet", MANIFEST}
    assert (output / "data.parquet").read_bytes() == b"new"


def test_error_names_changed_data_or_another_job(output: UPath) -> None:
    make(output)
    with pytest.raises(ConfigError, match="other data: the files of the input have changed"):
        make(output, IDENTITY | {"source": "y"})
    with pytest.raises(ConfigError, match="made with job 'test'"):
        make(output, IDENTITY | {"job": "another"})


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(output: UPath, overwrite: bool) -> None:
    if output.protocol == "":
        output.mkdir(parents=True)
    write_whole(output / "thesis.txt", b"years of work")
    with pytest.raises(ConfigError, match="was not made by this job"):
        make(output, overwrite=overwrite)
    assert names(output) == {"thesis.txt"}


def make_unfinished_work(output: UPath) -> None:
    """Plan one piece, finish it, and fail before anything is published."""

    def job() -> None:
        with claim(output, IDENTITY, overwrite=False) as work:
            assert work.planned("stage", lambda folder: [{"piece": 1}]) == [{"piece": 1}]
            write_whole(work.folder("stage") / "000000.json", b"{}")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        job()


def test_unfinished_work_is_resumed_with_the_same_plan(output: UPath) -> None:
    make_unfinished_work(output)
    assert not output.exists()
    with claim(output, IDENTITY, overwrite=False) as work:
        assert work.planned("stage", lambda folder: [{"piece": 2}]) == [{"piece": 1}]
        assert (work.folder("stage") / "000000.json").exists()


def test_unfinished_work_of_other_settings_is_discarded_only_with_overwrite(output: UPath) -> None:
    make_unfinished_work(output)
    with pytest.raises(ConfigError, match=r"unfinished work with other settings \(a.b=1\)"):
        make(output, OTHER)
    with claim(output, OTHER, overwrite=True) as work:
        assert not (work.folder("stage") / "000000.json").exists()


def test_partial_files_of_killed_workers_are_not_published(tmp_path: Path) -> None:
    output = UPath(tmp_path / "out")
    with claim(output, IDENTITY, overwrite=False) as work:
        write_whole(work.tree / "data.parquet", b"x")
        Path(str(work.tree), ".data.parquet.abc").write_bytes(b"half")
        work.publish({})
    assert names(output) == {"data.parquet", MANIFEST}


def test_object_storage_has_a_marker_while_files_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    output = UPath("memory://bucket/out")
    copies: list[tuple[str, bool]] = []
    original = type(output.fs).cp_file

    def cp_file(self: Any, source: str, target: str, **options: Any) -> None:
        copies.append((target.rpartition("/")[2], (output / INCOMPLETE).exists()))
        original(self, source, target, **options)

    monkeypatch.setattr(type(output.fs), "cp_file", cp_file)
    make(output)
    output.fs.rm("/bucket", recursive=True)
    assert copies == [("data.parquet", True), (MANIFEST, True)]


def test_interrupted_publication_is_completed_by_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    output = UPath("memory://bucket/out")
    with monkeypatch.context() as patch:
        patch.setattr(type(output.fs), "cp_file", lambda *_, **__: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(OSError, match="cut"):
            make(output)
    assert (output / INCOMPLETE).exists()
    make(output)
    assert names(output) == {"data.parquet", MANIFEST}
    output.fs.rm("/bucket", recursive=True)


def test_failed_write_leaves_no_file(output: UPath) -> None:
    if output.protocol == "":
        output.mkdir(parents=True)

    def write() -> None:
        with whole_file(output / "x") as local:
            local.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert names(output) == set()


def test_second_job_on_an_output_is_rejected(output: UPath) -> None:
    with claim(output, IDENTITY, overwrite=False):
        with pytest.raises(ConfigError, match=r"being written by another job \(process \d+ on"):
            make(output)
        assert not output.exists()
    make(output)


def test_lease_without_heartbeat_is_taken_over(output: UPath) -> None:
    dead = {"owner": "dead", "host": "another-host", "pid": 1, "beat": 7}
    partial = partial_path(output)
    if output.protocol == "":
        partial.mkdir(parents=True)
    write_whole(partial / "lease.json", json.dumps(dead).encode())
    make(output)
    assert (output / "data.parquet").exists()


def test_dead_lease_is_taken_over_by_one_of_two_jobs(tmp_path: Path) -> None:
    path = UPath(tmp_path / "lease.json")
    write_whole(path, json.dumps({"owner": "dead", "host": "another-host", "pid": 1, "beat": 7}).encode())
    outcomes: list[str] = []
    inside = threading.Barrier(2, timeout=20)

    def take() -> None:
        try:
            with Lease(path, "place"):
                outcomes.append("acquired")
                inside.wait()
        except LongClipError:
            outcomes.append("rejected")
            inside.wait()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["acquired", "rejected"]


def test_job_that_lost_its_lease_publishes_nothing(output: UPath) -> None:

    def job() -> None:
        with claim(output, IDENTITY, overwrite=False) as work:
            write_whole(work.tree / "data.parquet", b"x")
            write_whole(work.partial / "lease.json", json.dumps({"owner": "another"}).encode())
            work.publish({})

    with pytest.raises(LongClipError, match="taken over by another job"):
        job()
    assert not output.exists()
    assert json.loads((partial_path(output) / "lease.json").read_bytes()) == {"owner": "another"}


def test_lease_of_a_killed_process_is_released_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 3600)
    path = tmp_path / "lease.json"
    program = f"""
import time
from upath import UPath
from pipelines.common.lease import Lease
with Lease(UPath({str(path)!r}), "place"):
    print("acquired", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "acquired\n"
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    with Lease(UPath(path), "place"):
        pass
    assert not path.exists()
