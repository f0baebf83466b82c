"""Data jobs with input and output on S3, while the network fails and the server restarts."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prepare, summarize
from pipelines.common.entry import run_entry
from pipelines.common.parquet_set import open_parquet
from pipelines.common.storage import Storage, open_path
from pipelines.common.whole_files import write_whole
from pipelines.data.workspace import MANIFEST
from tests.support.broken_rows import jpeg
from tests.support.local_ray import own_ray
from tests.support.s3_server import KEY, SECRET, FaultProxy, S3Server

pytestmark = pytest.mark.slow

ROWS, ROWS_PER_PIECE = 300, 15
BUCKET = "jobs"
OUTAGE_SECONDS = 5
"""The server takes as long again to start: enough for the tens of concurrent requests of a unit to fail several times
each. Their pauses double, so that a longer outage costs a multiple of its length."""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def storage(s3_server: S3Server, s3_proxy: FaultProxy) -> Iterator[Storage]:
    """Access through the proxy, and one local Ray whose workers have the credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        s3_proxy.reset()
        storage = Storage(endpoint_url=s3_proxy.url, path_style=True)
        open_path("x", f"s3://{BUCKET}/x", storage).fs.makedirs(BUCKET, exist_ok=True)
        with own_ray(num_cpus=2):
            yield storage
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input on a disk: captions and paths of images; some are broken, some are duplicates."""
    root = tmp_path_factory.mktemp("local")
    (root / "in" / "images").mkdir(parents=True)
    rows = []
    for number in range(ROWS):
        image = b"broken" if number % 30 == 0 else jpeg(number - 1 if number % 30 == 15 else number)
        (root / "in" / "images" / f"{number:04d}.jpg").write_bytes(image)
        text = f"Picture {number} is here. It has spots. All of them are round."
        rows.append({"id": f"row-{number:04d}", "image": f"{number:04d}.jpg", "caption": text})
    pq.write_table(pa.Table.from_pylist(rows), root / "in" / "rows.parquet", row_group_size=ROWS_PER_PIECE)
    return root


@pytest.fixture(scope="module")
def remote(local: Path, storage: Storage) -> str:
    """The same in a bucket."""
    root = open_path("x", f"s3://{BUCKET}/in", storage)
    root.fs.put(str(local / "in"), root.path, recursive=True)
    return str(root)


@pytest.fixture
def run(storage: Storage, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_job(verb: str, source: str, output: str) -> str:
        piece = "source.rows_per_piece" if verb == "prepare" else "rows_per_piece"
        settings = [f"input={source}", f"output={output}", f"{piece}={ROWS_PER_PIECE}", "storage.path_style=true"]
        settings += [f"storage.endpoint_url={storage.endpoint_url}"]
        entry = prepare if verb == "prepare" else summarize
        with pytest.raises(SystemExit) as exited:
            run_entry(lambda: entry.main([part for text in settings for part in ("--set", text)]))
        out, err = capsys.readouterr()
        assert not exited.value.code, err[-3000:]
        return out

    return run_job


@pytest.fixture(scope="module")
def expected(local: Path, storage: Storage) -> dict[str, list[dict[str, Any]]]:
    """Rows of the same jobs from disk to disk."""
    for entry, source, output, piece in (
        (prepare, "in", "clean", "source.rows_per_piece"),
        (summarize, "clean", "summarized", "rows_per_piece"),
    ):
        settings = [f"input={local / source}", f"output={local / output}", f"{piece}={ROWS_PER_PIECE}"]
        entry.main([part for text in settings for part in ("--set", text)])
    return {name: rows_of(str(local / name), Storage()) for name in ("clean", "summarized")}


def rows_of(output: str, storage: Storage) -> list[dict[str, Any]]:
    data = open_parquet("x", output, storage, ["id"])
    return [row for file in data.files for row in pq.read_table(file.path.open("rb")).to_pylist()]


def left_behind(output: str, storage: Storage) -> list[str]:
    path = open_path("x", output, storage)
    return [
        name for name in path.fs.find(path.parent.path) if f".{path.name}.partial/" in name or "_INCOMPLETE" in name
    ]


def test_jobs_survive_an_unreliable_network(
    run: Run, remote: str, expected: dict[str, list[dict[str, Any]]], storage: Storage, s3_proxy: FaultProxy
) -> None:
    clean, summarized = f"s3://{BUCKET}/faults/clean", f"s3://{BUCKET}/faults/summarized"
    s3_proxy.reset(every=15)
    out = run("prepare", f"{remote}/rows.parquet", clean)
    assert f"prepare: {ROWS} rows in, {ROWS - 20} out, 10 rejected" in out
    assert "10 duplicates" in out
    out = run("summarize", clean, summarized)
    assert f"summarize: {ROWS - 20} rows in, {ROWS - 20} out, 0 rejected" in out
    assert all(s3_proxy.faults[kind] >= 3 for kind in FaultProxy.KINDS), s3_proxy.faults
    s3_proxy.reset()
    assert rows_of(clean, storage) == expected["clean"]
    assert rows_of(summarized, storage) == expected["summarized"]
    assert left_behind(clean, storage) == left_behind(summarized, storage) == []


def test_job_survives_a_restart_of_the_server(
    run: Run,
    remote: str,
    expected: dict[str, list[dict[str, Any]]],
    storage: Storage,
    s3_server: S3Server,
    s3_proxy: FaultProxy,
) -> None:
    clean = f"s3://{BUCKET}/killed/clean"
    s3_proxy.reset()
    kills: list[threading.Thread] = []

    def kill_once(number: int) -> None:
        if number == 150 and not kills:
            kills.append(threading.Thread(target=restart))
            kills[0].start()

    def restart() -> None:
        s3_server.kill()
        time.sleep(OUTAGE_SECONDS)
        s3_server.start()

    s3_proxy.on_request = kill_once
    out = run("prepare", f"{remote}/rows.parquet", clean)
    assert kills, "the job ended before the server was killed"
    kills[0].join()
    s3_proxy.reset()
    assert f"prepare: {ROWS} rows in, {ROWS - 20} out, 10 rejected" in out
    assert rows_of(clean, storage) == expected["clean"]
    assert left_behind(clean, storage) == []


def test_readers_never_see_an_incomplete_output(run: Run, remote: str, storage: Storage, s3_proxy: FaultProxy) -> None:
    output = open_path("x", f"s3://{BUCKET}/whole/clean", storage)
    direct = open_path("x", str(output), Storage(endpoint_url=f"http://127.0.0.1:{s3_proxy.target}", path_style=True))
    seen: set[tuple[bool, bool]] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.01):
            names = {name.rpartition("/")[2] for name in direct.fs.find(direct.path)}
            if any(name.endswith(".parquet") for name in names):
                seen.add((MANIFEST in names, "_INCOMPLETE" in names))

    write_whole(output.parent / "other.txt", b"not of the job")
    reader = threading.Thread(target=look)
    reader.start()
    run("prepare", f"{remote}/rows.parquet", str(output))
    time.sleep(0.1)
    stop.set()
    reader.join()
    assert (True, False) in seen
    assert (False, False) not in seen, "files with neither manifest nor marker"
    assert (output.parent / "other.txt").exists()
