"""Storage: local paths, `s3://` and any other fsspec URI, and errors that say why it cannot be reached.

Paths are `upath.UPath`: pathlib's interface over fsspec. Credentials come only from the environment (`AWS_*`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import fsspec
import pyarrow.fs as pafs
from upath import UPath

from longclip.errors import ConfigError, DataError, DiskFullError, one_line
from pipelines.common.settings import Settings

READ_SECONDS, CONNECT_SECONDS = 60, 10
S3 = ("s3", "s3a")
MAKE_ROOM = "free some space and run the same command again"
RETRIES = 9
"""Retries of a request. Their random pauses double, to 256 s on average in total, so that none of hundreds of requests
gives up within the half minute that a server takes to restart."""

JOB_PACKAGE = "working_dir_files"
"""Part of the path into which Ray unpacks the working directory of a submitted job."""


class Storage(Settings):
    """Access to object storage; the defaults are those of the environment."""

    endpoint_url: str | None = None
    """S3-compatible server, e.g. http://127.0.0.1:8333; null: AWS_ENDPOINT_URL, or Amazon's server."""
    path_style: bool = False
    """Address buckets as endpoint/bucket instead of bucket.endpoint, as servers other than Amazon's always are."""
    anonymous: bool = False
    """Read public buckets without credentials."""

    @property
    def endpoint(self) -> str | None:
        """Address of the S3 server; None for Amazon's."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")

    def options(self, protocol: str, retries: int = RETRIES) -> dict[str, Any]:
        """Options of the fsspec filesystem of a protocol; empty for all but S3."""
        if protocol not in S3:
            return {}
        config: dict[str, Any] = {
            # Not botocore's newer "standard" mode: it stops retrying when a client's requests have failed a hundred
            # times together, which tens of concurrent reads do in the first seconds of an outage.
            "retries": {"max_attempts": retries, "mode": "legacy"},
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
        }
        if self.path_style:
            config["s3"] = {"addressing_style": "path"}
        # s3fs caches listings forever by default: files that other processes write would stay invisible.
        options: dict[str, Any] = {"config_kwargs": config, "use_listings_cache": False, "anon": self.anonymous}
        if self.endpoint_url:
            options["endpoint_url"] = self.endpoint_url
        return options


def storage_path(field: str, value: str) -> str:
    """A path that is valid in every process of a cluster: URIs unchanged, local paths made absolute.

    A submitted job runs in a temporary copy of its working directory. An output with a relative path would be deleted
    with it, so relative paths are rejected.

    Raises:
        ConfigError: the path is empty, or relative inside a submitted job.
    """
    if not value:
        raise ConfigError(f"{field} is empty; give a path, e.g. --set {field}=/data/train")
    if "://" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_absolute() and JOB_PACKAGE in os.getcwd():
        raise ConfigError(
            f"{field}='{value}' is relative, but a submitted job runs in a temporary copy of its working directory;"
            f" give an absolute path or a URI, e.g. --set {field}=$PWD/{value}"
        )
    return str(path.absolute())


def local_path(field: str, value: str) -> Path:
    """`storage_path` for a setting that cannot be a URI.

    Raises:
        ConfigError: it is a URI, or `storage_path` refuses it.
    """
    if "://" in value:
        raise ConfigError(f"{field}='{value}' is a URI, but this entry needs a local path; give a path")
    return Path(storage_path(field, value))


def open_path(field: str, value: str, storage: Storage) -> UPath:
    """The path that a setting names; nothing is read yet.

    Args:
        field: setting that contains `value`, for messages.
        value: local path, `s3://bucket/key`, or a URI of any other fsspec filesystem.
        storage: access to object storage.

    Raises:
        ConfigError: the path is empty or relative in a submitted job, or its protocol is unknown or not installed.
    """
    path = storage_path(field, value)
    protocol = urlsplit(path).scheme if "://" in path else "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{field}='{value}': protocol '{protocol}' cannot be used: {error}; give a local path, s3://bucket/key or a"
            " URI whose fsspec filesystem is installed"
        ) from error
    return UPath(path, **storage.options(protocol))


def existing_path(field: str, value: str, storage: Storage) -> UPath:
    """`open_path` for a path that must exist.

    Raises:
        DataError: it does not exist, is not readable, or its server does not answer. This fails within seconds instead
            of after all retries: at the start of a job, the likely reason is a wrong address.
    """
    path = open_path(field, value, storage)
    single_retry = UPath(str(path), **storage.options(path.protocol, retries=1))
    with explained(field, value):
        if not single_retry.exists():
            bucket = single_retry.path.split("/")[0]
            if not is_local(path) and not single_retry.fs.exists(bucket):
                raise FileNotFoundError(f"bucket does not exist: {bucket}")
            raise FileNotFoundError(value)
    return path


def output_path(field: str, value: str, storage: Storage) -> UPath:
    """`open_path` for a path that will be written.

    Raises:
        ConfigError: it is the root of a bucket or filesystem: the workspace of the job is created next to the output.
        DataError: its bucket is missing, or its server does not answer.
    """
    path = open_path(field, value.rstrip("/"), storage)
    if not path.name or path.parent == path or (not is_local(path) and "/" not in path.path.strip("/")):
        raise ConfigError(f"{field}='{value}' is the root of its storage; give a name below it, e.g. {value}/train")
    if path.protocol in S3:
        existing_path(field, f"{path.protocol}://{path.path.split('/')[0]}", storage)
    return path


def arrow_filesystem(path: UPath) -> pafs.FileSystem:
    """The filesystem of a path, for pyarrow and Ray Data."""
    return pafs.LocalFileSystem() if is_local(path) else pafs.PyFileSystem(pafs.FSSpecHandler(path.fs))


def is_local(path: UPath) -> bool:
    """Whether a path is on a filesystem of this machine, where renaming is atomic."""
    return path.protocol in ("", "file", "local")


@contextmanager
def explained(field: str, path: UPath | str) -> Iterator[None]:
    """Turn errors of storage in the block into one line that says what to do.

    Raises:
        DiskFullError: the disk is full.
        DataError: any other error of storage.
    """
    try:
        yield
    except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        if disk_is_full(error):
            raise DiskFullError(f"{field}='{path}': {one_line(error)}; {MAKE_ROOM}") from error
        raise DataError(f"{field}='{path}' {_explanation(error)}") from error


def disk_is_full(error: BaseException) -> bool:
    """Whether an error reports a full disk. Lance, safetensors and tokenizers raise their own types of error, with the
    message of the operating system."""
    text = str(error)
    return os.strerror(errno.ENOSPC) in text and "\n" not in text  # Ray's wrappers hold whole tracebacks


def _explanation(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return "needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.anonymous=true"
    if isinstance(error, PermissionError):
        return f"is not accessible: {text}; check its permissions, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "bucket does not exist" in text.lower() or "NoSuchBucket" in text:
        return "is in a bucket that does not exist; create it, or check the name and storage.endpoint_url"
    if isinstance(error, FileNotFoundError):
        return "does not exist; give an existing file, directory or URI"
    connection = (
        botocore.exceptions.HTTPClientError,  # base of the errors of connections and timeouts
        botocore.exceptions.ConnectionError,
        ConnectionError,
        TimeoutError,
    )
    if isinstance(error, connection):
        return f"cannot be reached: {text}; check storage.endpoint_url or AWS_ENDPOINT_URL and that the server is up"
    return f"cannot be used: {text}"
