"""Where data lies: local paths, `s3://` and any other fsspec URI, and what went wrong when it cannot be reached.

Paths are `upath.UPath`: pathlib's interface over fsspec. Credentials come from the environment only (`AWS_*`).
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
MAKE_ROOM = "make room and run the same command again"
RETRIES = 9
"""Of one request. Their random pauses double, to 256 s in the mean together, so that no request of hundreds gives up
within the half minute that a server takes to come back."""


JOB_PACKAGE = "working_dir_files"
"""Part of the path into which Ray unpacks the working directory of a submitted job."""


class Storage(Settings):
    """Object storage that is not Amazon's, or not where the environment says."""

    endpoint_url: str | None = None
    """S3-compatible server, e.g. http://127.0.0.1:8333; empty takes AWS_ENDPOINT_URL, or else Amazon's."""
    path_style: bool = False
    """Address buckets as endpoint/bucket instead of bucket.endpoint; servers other than Amazon's always are."""
    anonymous: bool = False
    """Read public buckets without credentials."""

    @property
    def endpoint(self) -> str | None:
        """Address of the S3 server; None for Amazon's."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")

    def options(self, protocol: str, retries: int = RETRIES) -> dict[str, Any]:
        """Options of the fsspec filesystem of a protocol; only S3 takes any."""
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
        # Listings of s3fs are cached for ever by default: files that other processes write would stay unseen.
        options: dict[str, Any] = {"config_kwargs": config, "use_listings_cache": False, "anon": self.anonymous}
        if self.endpoint_url:
            options["endpoint_url"] = self.endpoint_url
        return options


def storage_path(field: str, value: str) -> str:
    """A path that every process of a cluster understands: URIs unchanged, local paths made absolute.

    A submitted job runs in a temporary copy of its working directory. A relative path would vanish with it, so it is
    refused.

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


def open_path(field: str, value: str, storage: Storage) -> UPath:
    """The place that a setting names; nothing is read yet.

    Args:
        field: setting that `value` came from, for messages.
        value: local path, `s3://bucket/key`, or a URI of any other filesystem that fsspec knows.
        storage: how object storage is reached.

    Raises:
        ConfigError: the path is empty, relative in a submitted job, or its protocol unknown or not installed.
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
    """`open_path` of something that is there.

    Raises:
        DataError: it is not there, not readable, or its server does not answer. This takes seconds, not the patience of
            a running job: at the start, a server that does not answer is more likely a wrong address.
    """
    path = open_path(field, value, storage)
    impatient = UPath(str(path), **storage.options(path.protocol, retries=1))
    with explained(field, value):
        if not impatient.exists():
            bucket = impatient.path.split("/")[0]
            if not is_local(path) and not impatient.fs.exists(bucket):
                raise FileNotFoundError(f"bucket does not exist: {bucket}")
            raise FileNotFoundError(value)
    return path


def output_path(field: str, value: str, storage: Storage) -> UPath:
    """`open_path` of something that will be written.

    Raises:
        ConfigError: it is the root of a bucket or filesystem: work in progress needs a place beside it.
        DataError: its bucket is missing, or its server does not answer.
    """
    path = open_path(field, value.rstrip("/"), storage)
    if not path.name or path.parent == path or (not is_local(path) and "/" not in path.path.strip("/")):
        raise ConfigError(f"{field}='{value}' is the root of its storage; give a name below it, e.g. {value}/train")
    if path.protocol in S3:
        existing_path(field, f"{path.protocol}://{path.path.split('/')[0]}", storage)
    return path


def arrow_filesystem(path: UPath) -> pafs.FileSystem:
    """The same filesystem for pyarrow and Ray Data."""
    return pafs.LocalFileSystem() if is_local(path) else pafs.PyFileSystem(pafs.FSSpecHandler(path.fs))


def is_local(path: UPath) -> bool:
    """Whether a path lies on a filesystem of this machine, where renaming is atomic."""
    return path.protocol in ("", "file", "local")


@contextmanager
def explained(field: str, path: UPath | str) -> Iterator[None]:
    """Turn what storage raises inside the block into one line that says what to do.

    Raises:
        DiskFullError: what was written did not fit.
        DataError: anything else.
    """
    try:
        yield
    except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        if disk_is_full(error):
            raise DiskFullError(f"{field}='{path}': {one_line(error)}; {MAKE_ROOM}") from error
        raise DataError(f"{field}='{path}' {_explanation(error)}") from error


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says so. Lance, safetensors and tokenizers raise their own, with the system's words."""
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
        botocore.exceptions.HTTPClientError,  # holds the errors of connections and timeouts
        botocore.exceptions.ConnectionError,
        ConnectionError,
        TimeoutError,
    )
    if isinstance(error, connection):
        return f"cannot be reached: {text}; check storage.endpoint_url or AWS_ENDPOINT_URL and that the server is up"
    return f"cannot be used: {text}"
