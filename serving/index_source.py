"""The index to serve. The builder picks the newest version built with the model; replicas download exactly that one."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import botocore.exceptions
from upath import UPath

from longclip.errors import one_line
from longclip.index import (
    MANIFEST,
    Manifest,
    PublishedIndex,
    SearchIndexError,
    newest_version,
    parse_manifest,
    shard_name,
    version_directory,
    version_manifests,
)
from serving.node_cache import cached


@dataclass(frozen=True)
class IndexVersion:
    """A published version, which is immutable."""

    uri: str
    """Absolute directory, or a URI such as `s3://...`."""
    manifest: Manifest
    cache: str
    """Directory for downloads, on each node."""

    @property
    def digest(self) -> str:
        """Hex digest of the location and the manifest: different for different content."""
        return hashlib.sha256(f"{self.uri}\0{self.manifest}".encode()).hexdigest()[:16]


def find_index(index: str, checkpoint_id: str, cache: str) -> IndexVersion:
    """Find the version of an index to serve with a model.

    Args:
        index: directory or URI written by `embed`; `INDEX@N` requires version N.
        checkpoint_id: id of the served model.
        cache: directory for downloads.

    Raises:
        SearchIndexError: there is no index, or no version built with the model.
    """
    location, at, number = index.rpartition("@")
    if not (at and number.isdecimal()):
        location, number = index, ""
    root = UPath(location if "://" in location else str(Path(location).expanduser().absolute()))
    with _read_errors(index):
        manifests = [manifest for manifest in version_manifests(root) if not number or manifest.version == int(number)]
    newest = newest_version(manifests, checkpoint_id, index)
    return IndexVersion(str(version_directory(root, newest.version)), newest, str(Path(cache).expanduser()))


def open_index(version: IndexVersion) -> PublishedIndex:
    """Open a version on this node, downloading it if it is remote, and verify it.

    Raises:
        SearchIndexError: it is damaged, or has changed since the application was built.
    """
    index = PublishedIndex.open(_download(version))
    if index.manifest != version.manifest:
        raise _changed(version.uri)
    return index


def find_pinned_version(uri: str, digest: str, cache: str) -> IndexVersion:
    """The version returned earlier by `find_index`, from its `uri` and `digest`.

    Raises:
        SearchIndexError: it cannot be read, or has changed since the application was built.
    """
    with _read_errors(uri):
        content = (UPath(uri) / MANIFEST).read_bytes()
    version = IndexVersion(uri, parse_manifest(content, uri), cache)
    if version.digest != digest:
        raise _changed(uri)
    return version


def open_shard(version: IndexVersion, number: int) -> PublishedIndex:
    """Open one shard of a version on this node; only this shard is downloaded.

    Raises:
        SearchIndexError: it is damaged, or has changed since the application was built.
    """
    return PublishedIndex.open_shard(_download(version, shard_name(number)), version.manifest, number)


def _download(version: IndexVersion, part: str = "") -> Path:
    source = UPath(version.uri) / part
    if source.protocol in ("", "file", "local"):
        return Path(source.path)

    def download(temporary: Path) -> Path:
        with _read_errors(str(source)):
            source.fs.get(f"{source.path.rstrip('/')}/", f"{temporary}/index/", recursive=True)
        return temporary / "index"

    return cached(Path(version.cache) / "indexes" / version.digest / (part or "whole"), download)


@contextmanager
def _read_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        reason = one_line(error)
        raise SearchIndexError(f"index '{uri}' cannot be read: {reason}; check its path and AWS_*") from error


def _changed(uri: str) -> SearchIndexError:
    return SearchIndexError(f"index '{uri}' changed since the application was built; deploy again")
