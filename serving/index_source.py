"""The index to serve: the newest version that was made with the model, found once, fetched by every replica."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import botocore.exceptions
from upath import UPath

from longclip.errors import one_line
from longclip.index import (
    Manifest,
    PublishedIndex,
    SearchIndexError,
    newest_version,
    version_directory,
    version_manifests,
)
from serving.cache import cached

STORAGE_ERRORS = (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)


@dataclass(frozen=True)
class IndexVersion:
    """A published version, which never changes."""

    uri: str
    """Absolute directory, or `s3://` and the like."""
    manifest: Manifest
    cache: str
    """Directory of this node that keeps what was downloaded."""


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
    try:
        manifests = [found for found in version_manifests(root) if not number or found.version == int(number)]
    except STORAGE_ERRORS as error:
        reason = one_line(error)
        raise SearchIndexError(f"index '{index}' cannot be read: {reason}; check its address and AWS_*") from error
    manifest = newest_version(manifests, checkpoint_id, index)
    return IndexVersion(str(version_directory(root, manifest.version)), manifest, str(Path(cache).expanduser()))


def open_index(version: IndexVersion) -> PublishedIndex:
    """Open a version on this node, downloaded where it is not local, verified against what was found.

    Raises:
        SearchIndexError: it is damaged, or is not what was found any more.
    """
    index = PublishedIndex.open(_download(version))
    if index.manifest != version.manifest:
        raise SearchIndexError(f"index '{version.uri}' changed since the application was built; deploy again")
    return index


def _download(version: IndexVersion) -> Path:
    source = UPath(version.uri)
    if source.protocol in ("", "file", "local"):
        return Path(source.path)
    key = hashlib.sha256(f"{version.uri}\0{version.manifest}".encode()).hexdigest()[:16]

    def download(aside: Path) -> Path:
        try:
            source.fs.get(f"{source.path.rstrip('/')}/", f"{aside}/index/", recursive=True)
        except STORAGE_ERRORS as error:
            raise SearchIndexError(f"index '{version.uri}' cannot be downloaded: {one_line(error)}") from error
        return aside / "index"

    return cached(Path(version.cache) / "indexes" / key, download)
