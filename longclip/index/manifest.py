"""The manifest of a published index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longclip.errors import DataError

MANIFEST, PUBLISHED = "manifest.json", "published"
MANIFEST_VERSION = 2
TARGETS = ("image", "caption")
"""What queries can be compared with."""


def vectors_file(target: str) -> str:
    """File of a shard with the unit vectors `[n, E]` float32 of a target, as numpy saves them."""
    return f"{target}.npy"


def targets_of(entry: Mapping[str, Any]) -> list[str]:
    """What queries can be compared with in a shard, by its entry in the manifest."""
    return [target for target in TARGETS if vectors_file(target) in entry["files"]]


class SearchIndexError(DataError):
    """An index is missing, damaged, or was made with another model."""


@dataclass(frozen=True)
class Manifest:
    """A published version of an index."""

    version: int
    checkpoint_id: str
    """The model that made all of its vectors."""
    embedding_dim: int
    context_length: int
    count: int
    shards: list[dict[str, Any]]
    """For each shard its `rows`, and `files`: sha256 by name."""
    engine: dict[str, Any]
    """`name` is `exact`, or `ivf` with `lists` of each shard and `probes` for each target."""
    gate: list[dict[str, Any]]
    """Search quality measured before publishing: recall@10 against exact search, by target, queries, probes."""
    metadata: dict[str, str]
    """Arrow types of the columns that can be filtered by."""
    source: str
    table_version: int
    created: str

    @property
    def targets(self) -> list[str]:
        """What queries can be compared with."""
        return targets_of(self.shards[0])


def version_directory(index: Any, version: int) -> Any:
    """Directory of a version of an index; `index` is a `Path`, or similar such as a `UPath`."""
    return index / PUBLISHED / f"{version:06d}"


def version_manifests(index: Any) -> list[Manifest]:
    """Manifests of all complete versions of an index, oldest first; a directory without one is not a version yet.

    Args:
        index: its `Path`, or similar such as a `UPath`.
    """
    folder = index / PUBLISHED
    directories = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    whole = [path for path in directories if (path / MANIFEST).exists()]
    manifests = [parse_manifest((path / MANIFEST).read_bytes(), str(path)) for path in whole]
    return sorted(manifests, key=lambda manifest: manifest.version)


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a published version; raises `SearchIndexError`."""
    path = Path(directory) / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(directory))
    except FileNotFoundError:
        raise SearchIndexError(f"index '{directory}' has no {MANIFEST}; give an index written by embed") from None
    except OSError as error:
        raise SearchIndexError(f"index '{directory}': cannot read {MANIFEST}: {error}") from error


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Parse a manifest; `place` is for error messages. Raises `SearchIndexError`."""
    try:
        values = json.loads(content)
    except ValueError as error:
        raise SearchIndexError(f"index '{place}': cannot read {MANIFEST}: {error}") from error
    version = values.get("manifest_version") if isinstance(values, dict) else None
    if version != MANIFEST_VERSION:
        raise SearchIndexError(
            f"index '{place}' has manifest_version {version!r}, this release reads {MANIFEST_VERSION};"
            " embed the corpus again"
        )
    missing = [field.name for field in fields(Manifest) if field.name not in values]
    if missing:
        raise SearchIndexError(f"index '{place}': {MANIFEST} lacks {', '.join(missing)}; embed the corpus again")
    return Manifest(**{field.name: values[field.name] for field in fields(Manifest)})


def newest_version(manifests: list[Manifest], checkpoint_id: str, place: str) -> Manifest:
    """The newest version that was made with a model, so that what is served always fits the model.

    Raises:
        SearchIndexError: there is none; vectors of different models cannot be compared.
    """
    if not manifests:
        raise SearchIndexError(f"index '{place}' has no published version; give an index written by embed")
    fitting = [manifest for manifest in manifests if manifest.checkpoint_id == checkpoint_id]
    if not fitting:
        newest = max(manifests, key=lambda manifest: manifest.version)
        raise SearchIndexError(
            f"index '{place}' was made with checkpoint {newest.checkpoint_id} (version {newest.version}), the model is"
            f" {checkpoint_id}; embed the corpus with this model, or serve the model that the index was made with"
        )
    return max(fitting, key=lambda manifest: manifest.version)
