"""A shard of a published index: writing, reading and searching its files.

In small shards a query is compared with every vector. Large ones also have a FAISS structure (IVF with vectors
quantised to 8 bits) that proposes candidates, which are compared exactly. Scores are inner products of unit vectors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longclip.files import file_sha256
from longclip.index.manifest import SearchIndexError, targets_of, vectors_file

Vectors = Mapping[str, np.ndarray]
"""Arrays by target."""

ITEMS = "items.arrow"
ITEM_COLUMNS = ("id", "caption", "thumbnail")
CANDIDATES = 10
"""Candidates per requested hit; the exact comparison selects the hits among them."""
EXACT_SUBSET = 20_000
"""If a filter leaves fewer items, the exact comparison is cheaper than the structure."""
BLOCK_ROWS = 65_536
NORM_TOLERANCE = 1e-3
TRAINING_VECTORS_A_LIST = 64


def structure_file(target: str) -> str:
    """File of a shard with its FAISS structure."""
    return f"{target}.faiss"


def write_shard(directory: Path, batches: Iterable[tuple[pa.Table, Vectors]], rows: int, lists: int) -> dict[str, Any]:
    """Write the files of a shard into an existing directory, a batch of items at a time.

    Args:
        directory: the existing directory.
        batches: `id`, `caption`, `thumbnail` and metadata columns of some items, and for each target their unit vectors
            `[n, E]` float32; at least one batch.
        rows: items of all batches.
        lists: inverted lists of the structure; 0 for none.

    Returns:
        The shard's entry in the manifest.
    """
    batches = iter(batches)
    first_items, first_vectors = next(batches)
    arrays = {
        target: np.lib.format.open_memmap(directory / vectors_file(target), "w+", np.float32, (rows, values.shape[1]))
        for target, values in first_vectors.items()
    }
    start = 0
    with pa.OSFile(str(directory / ITEMS), "wb") as file, pa.ipc.new_file(file, first_items.schema) as writer:
        for items, vectors in chain([(first_items, first_vectors)], batches):
            writer.write_table(items)
            for target, values in vectors.items():
                arrays[target][start : start + len(values)] = values
            start += items.num_rows
    for target, array in arrays.items():
        array.flush()
        if lists:
            _write_structure(directory / structure_file(target), array, lists)
    files = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
    return {"rows": rows, "files": files}


def _write_structure(path: Path, vectors: np.ndarray, lists: int) -> None:
    import faiss

    dim = vectors.shape[1]
    structure = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    sample = np.random.default_rng(0).permutation(len(vectors))[: lists * TRAINING_VECTORS_A_LIST]
    structure.train(vectors[np.sort(sample)])
    structure.add(vectors)
    faiss.write_index(structure, str(path))


@dataclass(frozen=True)
class BestRows:
    """The best rows of a shard for Q queries, best first."""

    scores: list[np.ndarray]
    """Q arrays of at most `top_k` inner products."""
    rows: list[np.ndarray]
    """Q arrays of as many rows."""


class Shard:
    """A shard on this machine, verified; vectors and items are memory-mapped."""

    def __init__(self, items: pa.Table, vectors: Vectors, structures: Mapping[str, Any]) -> None:
        self.items = items
        self.vectors = vectors
        self._structures = structures

    def __len__(self) -> int:
        return self.items.num_rows

    @classmethod
    def open(cls, directory: Path, entry: Mapping[str, Any], dim: int) -> "Shard":
        """Open a shard and verify it: checksums, counts, dimensions, unit lengths, unique ids.

        Args:
            directory: its directory.
            entry: its entry in the manifest.
            dim: dimension of the vectors.

        Raises:
            SearchIndexError: something is missing or does not match the manifest.
        """
        for name, expected in entry["files"].items():
            _verify_checksum(directory, name, expected)
        targets = targets_of(entry)
        try:
            vectors = {
                target: np.load(directory / vectors_file(target), mmap_mode="r", allow_pickle=False)
                for target in targets
            }
            with pa.memory_map(str(directory / ITEMS)) as source:
                items = pa.ipc.open_file(source).read_all()
            structures = {}
            for target in targets:
                if structure_file(target) in entry["files"]:
                    import faiss

                    structures[target] = faiss.read_index(str(directory / structure_file(target)))
        except (OSError, ValueError, KeyError, pa.ArrowException, RuntimeError) as error:
            raise SearchIndexError(f"index '{directory}' cannot be read: {str(error).splitlines()[0]}") from error
        shard = cls(items, vectors, structures)
        shard._verify(directory, entry["rows"], dim)
        return shard

    def _verify(self, directory: Path, rows: int, dim: int) -> None:
        if len(self) != rows:
            raise SearchIndexError(f"index '{directory}': {ITEMS} has {len(self)} rows, not {rows}")
        if any(self.items[name].null_count for name in ITEM_COLUMNS):
            raise SearchIndexError(f"index '{directory}': {ITEMS} has nulls; embed the corpus again")
        for target, vectors in self.vectors.items():
            name = vectors_file(target)
            if vectors.shape != (rows, dim) or vectors.dtype != np.float32:
                actual = f"{vectors.dtype} {list(vectors.shape)}"
                raise SearchIndexError(f"index '{directory}': {name} is {actual}, not float32 {[rows, dim]}")
            for start in range(0, rows, BLOCK_ROWS):
                block = vectors[start : start + BLOCK_ROWS]
                norms = np.sqrt(np.einsum("ne,ne->n", block, block))
                off = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # the negation also catches NaN
                if len(off):
                    raise SearchIndexError(
                        f"index '{directory}': {len(off)} vectors of {name} are not of unit length, first row"
                        f" {start + off[0]}; embed the corpus again"
                    )

    def search(
        self,
        queries: np.ndarray,
        target: str,
        top_k: int,
        mask: np.ndarray | None = None,
        probes: int | None = None,
    ) -> BestRows:
        """The best rows for each query, best first; of equal scores the earlier row first.

        Args:
            queries: `[Q, E]` float32 unit vectors.
            target: what they are compared with, `image` or `caption`.
            top_k: maximum rows per query.
            mask: `[n]` rows to search; None searches all.
            probes: inverted lists to probe; None compares every vector.
        """
        rows = None if mask is None else np.flatnonzero(mask)
        structure = self._structures.get(target)
        if structure is None or probes is None or (rows is not None and len(rows) <= EXACT_SUBSET):
            return self._exact(queries, target, top_k, rows)
        import faiss

        selector = None if rows is None else faiss.IDSelectorBatch(rows)
        parameters = faiss.SearchParametersIVF(nprobe=probes, sel=selector)  # type: ignore[call-arg]
        wanted = min(max(CANDIDATES * top_k, 100), len(self))
        _, candidates = structure.search(np.ascontiguousarray(queries), wanted, params=parameters)
        best = [
            self._exact(query[None], target, top_k, np.sort(named[named >= 0]))
            for query, named in zip(queries, candidates, strict=True)
        ]
        return BestRows([one.scores[0] for one in best], [one.rows[0] for one in best])

    def _exact(self, queries: np.ndarray, target: str, top_k: int, rows: np.ndarray | None) -> BestRows:
        """Compare with all vectors, or those of some rows, a block at a time."""
        vectors = self.vectors[target]
        count = len(vectors) if rows is None else len(rows)
        scores = [np.zeros(0, np.float32) for _ in queries]
        best = [np.zeros(0, np.int64) for _ in queries]
        for start in range(0, count, BLOCK_ROWS):
            part = (
                np.arange(start, min(start + BLOCK_ROWS, count)) if rows is None else rows[start : start + BLOCK_ROWS]
            )
            block = vectors[part[0] : part[-1] + 1] if rows is None else vectors[part]
            for number, values in enumerate(queries @ block.T):
                kept = best_rows(values, top_k)
                scores[number] = np.concatenate([scores[number], values[kept]])
                best[number] = np.concatenate([best[number], part[kept]])
                order = best_rows(scores[number], top_k)
                scores[number], best[number] = scores[number][order], best[number][order]
        return BestRows(scores, best)


def best_rows(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Rows of the `top_k` highest `scores [N]`, best first; of equal scores the earlier row first."""
    top_k = min(top_k, len(scores))
    if top_k == 0:
        return np.zeros(0, np.int64)
    # A partition alone would keep an arbitrary one of the rows that tie for the last position.
    threshold = np.partition(scores, -top_k)[-top_k]
    candidates = np.flatnonzero(scores >= threshold)
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:top_k]]


def _verify_checksum(directory: Path, name: str, expected: str) -> None:
    try:
        actual = file_sha256(directory / name)
    except OSError as error:
        raise SearchIndexError(f"index '{directory}': cannot read {name}: {error.strerror}") from error
    if actual != expected:
        raise SearchIndexError(
            f"index '{directory}': sha256 of {name} is {actual[:16]}..., the manifest says {expected[:16]}...;"
            " the file was changed or damaged, embed the corpus again"
        )
