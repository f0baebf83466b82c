"""Object storage as it is: a real S3 server, wrong credentials, faults on the way, a server that dies."""

import threading
from collections.abc import Iterator

import fsspec
import pytest
from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines.common.storage import Storage, existing_path, explained, open_path, output_path
from pipelines.common.whole_files import whole_file, write_whole
from pipelines.data.workspace import MANIFEST, claim, partial_path
from tests.support.s3_server import KEY, SECRET, FaultProxy, S3Server, free_ports

IDENTITY = {"job": "x", "settings": {}, "source": ""}
BUCKET = "storage"


@pytest.fixture
def server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with the credentials of a user's environment."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    forget()
    storage = Storage(endpoint_url=s3_server.url, path_style=True)
    open_path("x", f"s3://{BUCKET}/x", storage).fs.makedirs(BUCKET, exist_ok=True)
    yield s3_server
    forget()


@pytest.fixture
def storage(server: S3Server) -> Storage:
    return Storage(endpoint_url=server.url, path_style=True)


def forget() -> None:
    """fsspec keeps filesystems, and they keep the credentials that they were made with."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def names(path: UPath) -> set[str]:
    root = path.path.rstrip("/")
    return {name[len(root) + 1 :] for name in path.fs.find(root)} - {""}  # a server may keep an empty folder


def test_outputs_on_s3_are_published_by_one_job(storage: Storage) -> None:
    output = output_path("output", f"s3://{BUCKET}/published", storage)
    with claim(output, IDENTITY, overwrite=False) as work:
        with pytest.raises(ConfigError, match="being written by another job"), claim(output, IDENTITY, False):
            pass
        write_whole(work.tree / "train" / "a.parquet", b"rows")
        assert names(output) == set()
        work.publish({})
    assert names(output) == {"train/a.parquet", MANIFEST}
    assert names(partial_path(output)) == set()


def test_large_files_are_uploaded_in_parts_atomically(storage: Storage) -> None:
    path = open_path("x", f"s3://{BUCKET}/large", storage)
    content = bytes(range(256)) * 4096 * 70  # 70 MiB, more than one part

    def fail() -> None:
        with whole_file(path) as local:
            local.write_bytes(content)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not path.exists()
    write_whole(path, content)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("key", "secret", "expected"),
    [
        (KEY, "wrong-secret", "is not accessible"),
        ("wrong-key", SECRET, "is not accessible"),
        (None, None, "needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.anonymous=true"),
    ],
)
def test_wrong_or_no_credentials_are_one_line_without_secrets(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, key: str | None, secret: str | None, expected: str
) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", secret)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    forget()
    with pytest.raises(DataError) as error:
        existing_path("input", f"s3://{BUCKET}/x", Storage(endpoint_url=server.url, path_style=True))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    for hidden in (SECRET, "wrong-secret"):
        assert hidden not in str(error.value)


def test_error_names_what_is_missing(storage: Storage) -> None:
    with pytest.raises(DataError, match=r"input='s3://storage/none.parquet' does not exist"):
        existing_path("input", f"s3://{BUCKET}/none.parquet", storage)
    with pytest.raises(DataError, match="is in a bucket that does not exist; create it"):
        existing_path("input", "s3://no-such-bucket/x", storage)
    with pytest.raises(DataError, match="is in a bucket that does not exist; create it"):
        output_path("output", "s3://no-such-bucket/x", storage)
    with pytest.raises(ConfigError, match="is the root of its storage; give a name below it"):
        output_path("output", f"s3://{BUCKET}/", storage)


def test_error_for_an_unreachable_server(server: S3Server) -> None:
    nobody = Storage(endpoint_url=f"http://127.0.0.1:{free_ports(1)[0]}", path_style=True)
    with pytest.raises(DataError, match=r"cannot be reached: .*; check storage.endpoint_url or AWS_ENDPOINT_URL"):
        existing_path("input", f"s3://{BUCKET}/x", nobody)


def test_the_endpoint_may_come_from_the_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    write_whole(open_path("x", f"s3://{BUCKET}/from-environment", Storage()), b"x")
    assert existing_path("x", f"s3://{BUCKET}/from-environment", Storage()).read_bytes() == b"x"


def test_files_survive_an_unreliable_network(server: S3Server, s3_proxy: FaultProxy) -> None:
    s3_proxy.reset(every=4)
    root = open_path("x", f"s3://{BUCKET}/faults", Storage(endpoint_url=s3_proxy.url, path_style=True))
    content = {f"{number:03d}": bytes([number]) * 10_000 * number for number in range(1, 41)}
    for name, data in content.items():
        write_whole(root / name, data)
    assert names(root) == content.keys()
    paths = [f"{root.path}/{name}" for name in content]
    assert root.fs.cat_ranges(paths, 0, None, on_error="raise") == list(content.values())
    assert s3_proxy.faults.keys() == set(FaultProxy.KINDS)
    s3_proxy.reset()


@pytest.mark.slow
def test_lost_response_does_not_lock_a_job_out(server: S3Server, s3_proxy: FaultProxy) -> None:
    s3_proxy.reset(every=3)
    storage = Storage(endpoint_url=s3_proxy.url, path_style=True)
    for number in range(4):
        with claim(open_path("x", f"s3://{BUCKET}/lease-{number}", storage), IDENTITY, overwrite=False) as work:
            write_whole(work.tree / "a", b"x")
            work.publish({})
    assert s3_proxy.faults["lost"]
    s3_proxy.reset()


@pytest.mark.slow
def test_jobs_wait_for_a_server_that_restarts(server: S3Server, storage: Storage) -> None:
    path = open_path("x", f"s3://{BUCKET}/survives", storage)
    write_whole(path, b"before")
    server.kill()
    timer = threading.Timer(3, server.start)
    timer.start()
    try:
        with explained("x", path):
            assert path.read_bytes() == b"before"
    finally:
        timer.join()
    write_whole(path, b"after")
    assert path.read_bytes() == b"after"
