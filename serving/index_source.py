"""The index to serve: the newest version that was made with the model, found once, fetched by every replica."""

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
    """A published version, which never changes."""

    uri: str
    """Absolute directory, or `s3://` and the like."""
    manifest: Manifest
    cache: str
    """Directory of this node that keeps what was downloaded."""

    @property
    def digest(self) -> str:
        """Another one for other content, or the same content in another place."""
        return hashlib.sha256(f"{self.uri}\0{self.manifest}".encode()).hexdigest()[:16]


def find_index(index: str, checkpoint_id: str, cache: str) -> IndexVersion:
    """The version of an index to serve with a model.

    Args:
        index: directory or URI that `embed` wrote; with `@N`, that version and no other.
        checkpoint_id: the model that is served.
        cache: directory for downloads.

    Raises:
        SearchIndexError: there is none, or none that was made with the model.
    """
    place, at, number = index.rpartition("@")
    if not (at and number.isdecimal()):
        place, number = index, ""
    root = UPath(place if "://" in place else str(Path(place).expanduser().absolute()))
    with _reading(index):
        manifests = [found for found in version_manifests(root) if not number or found.version == int(number)]
    manifest = newest_version(manifests, checkpoint_id, index)
    return IndexVersion(str(version_directory(root, manifest.version)), manifest, str(Path(cache).expanduser()))


def open_index(version: IndexVersion) -> PublishedIndex:
    """Open a version on this node, downloaded where it is not local, verified against what was found.

    Raises:
        SearchIndexError: it is damaged, or is not what was found any more.
    """
    index = PublishedIndex.open(_download(version))
    if index.manifest != version.manifest:
        raise _changed(version.uri)
    return index


def reread(uri: str, digest: str, cache: str) -> IndexVersion:
    """The version that `find_index` found, by its `uri` and `digest`.

    Raises:
        SearchIndexError: it cannot be read, or is not what was found any more.
    """
    with _reading(uri):
        content = (UPath(uri) / MANIFEST).read_bytes()
    version = IndexVersion(uri, parse_manifest(content, uri), cache)
    if version.digest != digest:
        raise _changed(uri)
    return version


def open_shard(version: IndexVersion, number: int) -> PublishedIndex:
    """Open one shard of a version on this node, of which nothing else is downloaded.

    Raises:
        SearchIndexError: it is damaged, or is not what was found any more.
    """
    return PublishedIndex.open_shard(_download(version, shard_name(number)), version.manifest, number)


def _download(version: IndexVersion, part: str = "") -> Path:
    source = UPath(version.uri) / part
    if source.protocol in ("", "file", "local"):
        return Path(source.path)

    def download(aside: Path) -> Path:
        with _reading(str(source)):
            source.fs.get(f"{source.path.rstrip('/')}/", f"{aside}/index/", recursive=True)
        return aside / "index"

    return cached(Path(version.cache) / "indexes" / version.digest / (part or "whole"), download)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        reason = one_line(error)
        raise SearchIndexError(f"index '{place}' cannot be read: {reason}; check its address and AWS_*") from error


def _changed(uri: str) -> SearchIndexError:
    return SearchIndexError(f"index '{uri}' changed since the application was built; deploy again")
