"""The index directory: read, verified and searched exactly. Needs no Ray."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longclip.errors import DataError
from longclip.files import file_sha256

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
EMBEDDINGS = "embeddings.npy"
ITEMS = "items.parquet"
_SCHEMA = pa.schema([("id", pa.string()), ("caption", pa.string()), ("thumbnail", pa.binary())])
_NORM_TOLERANCE = 1e-3


class SearchIndexError(DataError):
    """An index is missing, damaged, or was made with another model."""


@dataclass(frozen=True)
class Manifest:
    """What an index says of itself."""

    checkpoint_id: str
    embedding_dim: int
    context_length: int
    count: int
    source: str
    created: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class Match:
    """One row of an index that answers a query."""

    id: str
    score: float
    caption: str


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of an index directory; raises `SearchIndexError`."""
    path = Path(directory) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SearchIndexError(f"index '{directory}' has no {MANIFEST}; give a directory written by embed") from None
    except (OSError, ValueError) as error:
        raise SearchIndexError(f"index '{directory}': cannot read {MANIFEST}: {error}") from error
    version = content.get("manifest_version") if isinstance(content, dict) else None
    if version != MANIFEST_VERSION:
        raise SearchIndexError(
            f"index '{directory}' has manifest_version {version!r}, this release reads {MANIFEST_VERSION};"
            " embed the corpus again"
        )
    missing = [field.name for field in fields(Manifest) if field.name not in content]
    if missing:
        raise SearchIndexError(f"index '{directory}': {MANIFEST} lacks {', '.join(missing)}; embed the corpus again")
    return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})


def check_model(directory: str | Path, manifest: Manifest, checkpoint_id: str) -> None:
    """Refuse an index of another model: its vectors would be compared with ones that mean something else."""
    if manifest.checkpoint_id != checkpoint_id:
        raise SearchIndexError(
            f"index '{directory}' was made with checkpoint {manifest.checkpoint_id}, the model is {checkpoint_id};"
            " embed the corpus with this model, or serve the model that the index was made with"
        )


class SearchIndex:
    """A verified index in memory; its vectors are memory-mapped."""

    def __init__(self, manifest: Manifest, embeddings: np.ndarray, items: pa.Table) -> None:
        self.manifest = manifest
        self._embeddings = embeddings
        self._captions = items["caption"]
        self._thumbnails = items["thumbnail"]
        self._ids: list[str] = items["id"].to_pylist()
        self._rows = {id: row for row, id in enumerate(self._ids)}

    @classmethod
    def open(cls, directory: str | Path) -> "SearchIndex":
        """Read an index and verify it: checksums, counts, dimensions, unit lengths, unique ids.

        Raises:
            SearchIndexError: something is missing, or does not agree with the manifest.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        for name in (EMBEDDINGS, ITEMS):
            _verify_checksum(directory, name, manifest.sha256.get(name))
        try:
            embeddings = np.load(directory / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
            items = pq.read_table(directory / ITEMS, columns=_SCHEMA.names).cast(_SCHEMA).combine_chunks()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise SearchIndexError(f"index '{directory}' cannot be read: {reason}") from error
        index = cls(manifest, embeddings, items)
        index._verify(directory)
        return index

    def _verify(self, directory: Path) -> None:
        count, dim = self.manifest.count, self.manifest.embedding_dim
        if self._embeddings.shape != (count, dim) or self._embeddings.dtype != np.float32:
            found = f"{self._embeddings.dtype} {list(self._embeddings.shape)}"
            raise SearchIndexError(f"index '{directory}': {EMBEDDINGS} is {found}, not float32 {[count, dim]}")
        if len(self._ids) != count:
            raise SearchIndexError(f"index '{directory}': {ITEMS} has {len(self._ids)} rows, not {count}")
        if self._captions.null_count or self._thumbnails.null_count or None in self._rows:
            raise SearchIndexError(f"index '{directory}': {ITEMS} has nulls; embed the corpus again")
        if len(self._rows) != count:
            raise SearchIndexError(f"index '{directory}': {count - len(self._rows)} ids occur more than once")
        norms = np.sqrt(np.einsum("ne,ne->n", self._embeddings, self._embeddings))
        off = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE))  # so that NaN is off, too
        if len(off):
            raise SearchIndexError(
                f"index '{directory}': {len(off)} vectors are not of unit length, first row {off[0]};"
                " embed the corpus again"
            )

    def search(self, queries: np.ndarray, top_k: int) -> list[list[Match]]:
        """The best rows for each query by inner product, best first; of equal scores the earlier row first.

        Args:
            queries: `[Q, E]` float32 unit vectors.
            top_k: most matches of a query.
        """
        scores = queries @ self._embeddings.T  # [Q, N]
        return [[self._match(row, values) for row in best_rows(values, top_k)] for values in scores]

    def _match(self, row: int, scores: np.ndarray) -> Match:
        return Match(self._ids[row], float(scores[row]), self._captions[row].as_py())

    def vector(self, id: str) -> np.ndarray | None:
        """The unit vector `[E]` of an item; None where the index has no such id."""
        row = self._rows.get(id)
        return None if row is None else np.array(self._embeddings[row])

    def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None where the index has no such id."""
        row = self._rows.get(id)
        return None if row is None else self._thumbnails[row].as_py()

    def examples(self, count: int) -> list[str]:
        """At most `count` different captions, spread evenly over the index."""
        rows = np.linspace(0, self.manifest.count - 1, min(count, self.manifest.count), dtype=int)
        captions = (self._captions[row].as_py() for row in rows.tolist())
        return list(dict.fromkeys(caption for caption in captions if caption.strip()))


def best_rows(scores: np.ndarray, top_k: int) -> list[int]:
    """Rows of the `top_k` highest `scores [N]`, best first; of equal scores the earlier row first."""
    top_k = min(top_k, len(scores))
    if top_k == 0:
        return []
    # A partition alone would keep any of the rows that tie for the last place.
    threshold = np.partition(scores, -top_k)[-top_k]
    candidates = np.flatnonzero(scores >= threshold)
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:top_k]].tolist()


def _verify_checksum(directory: Path, name: str, expected: str | None) -> None:
    try:
        found = file_sha256(directory / name)
    except OSError as error:
        raise SearchIndexError(f"index '{directory}': cannot read {name}: {error.strerror}") from error
    if found != expected:
        raise SearchIndexError(
            f"index '{directory}': sha256 of {name} is {found[:16]}..., the manifest says {str(expected)[:16]}...;"
            " the file was changed or damaged, embed the corpus again"
        )
