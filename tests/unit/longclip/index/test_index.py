"""A published index: what is found in it, what is refused, and how good its structure is."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from longclip.checkpoint import Checkpoint
from longclip.errors import DataError
from longclip.index import (
    PublishedIndex,
    SearchIndexError,
    newest_version,
    parse_filter,
    read_manifest,
    version_directory,
    version_manifests,
)
from longclip.index import shard as shard_module
from longclip.index.filters import MAX_CONDITIONS, MAX_DEPTH
from longclip.index.gate import fewest_probes, measure_probes
from longclip.index.shard import best_rows
from tests.support.scenes_index import change_manifest, write_index, write_version

ROWS, DIM = 3000, 32


@pytest.fixture
def version(tmp_path: Path, tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path) -> Path:
    """Four scenes, published."""
    index = write_index(tmp_path / "index", tiny_checkpoint, tiny_checkpoint_dir, count=4)
    return version_directory(index, 1)


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def clustered(rows: int = ROWS) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """Vectors in clusters; those of captions are moved away from those of images, as texts are."""
    draw = np.random.default_rng(1)
    centres = draw.normal(size=(40, DIM))
    images = unit(centres[draw.integers(40, size=rows)] + 0.7 * draw.normal(size=(rows, DIM)))
    captions = unit(images + 0.5 * draw.normal(size=(rows, DIM)) + 2 * unit(draw.normal(size=(1, DIM))))
    items = pa.table(
        {
            "id": [f"{row:05d}" for row in range(rows)],
            "caption": [f"caption {row}" for row in range(rows)],
            "thumbnail": [b"\xff\xd8"] * rows,
            "number": list(range(rows)),
        }
    )
    return items, {"image": images, "caption": captions}


def best_ids(vectors: np.ndarray, query: np.ndarray, top_k: int, rows: np.ndarray | None = None) -> list[str]:
    """By brute force in float64."""
    rows = np.arange(len(vectors)) if rows is None else rows
    scores = vectors[rows].astype(np.float64) @ query
    return [f"{rows[place]:05d}" for place in np.argsort(-scores, kind="stable")[:top_k]]


# ---- what is found


def test_an_index_finds_its_own_rows(version: Path) -> None:
    index = PublishedIndex.open(version)
    for target in ("image", "caption"):
        vector = index.vector("scene/2", target)
        assert vector is not None
        (matches,) = index.search(vector[None], 9, target)
        assert [len(matches), matches[0].id] == [4, "scene/2"]
        assert matches[0].score == pytest.approx(1, abs=1e-5)
    assert matches[0].metadata == {"number": 2, "parity": "even"}
    assert index.vector("scene/9") is None
    assert index.thumbnail("scene/9") is None
    assert (index.thumbnail("scene/0") or b"").startswith(b"\xff\xd8")
    assert len(index.examples(2)) == 2
    assert len(index.examples(99)) == 4


def test_exact_search_agrees_with_brute_force_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "BLOCK_ROWS", 700)
    items, vectors = clustered()
    index = PublishedIndex.open(write_version(tmp_path, 1, items, vectors))
    queries = vectors["caption"][::97]
    for query, matches in zip(queries, index.search(queries, 25), strict=True):
        assert [match.id for match in matches] == best_ids(vectors["image"], query, 25)


def test_equal_scores_keep_the_order_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "BLOCK_ROWS", 4)
    items, vectors = clustered(20)
    vectors = {target: np.repeat(values[:1], 20, axis=0) for target, values in vectors.items()}
    index = PublishedIndex.open(write_version(tmp_path, 1, items, vectors))
    (matches,) = index.search(vectors["image"][:1], 7)
    assert [match.id for match in matches] == [f"{row:05d}" for row in range(7)]


def test_best_rows_agree_with_a_full_sort() -> None:
    scores = np.random.default_rng(0).integers(0, 50, 1000).astype(np.float32)
    for top_k in (0, 1, 7, 100, 1000, 2000):
        assert best_rows(scores, top_k).tolist() == np.argsort(-scores, kind="stable")[:top_k].tolist()


@pytest.mark.parametrize("subset", [0, 10_000])
def test_structures_find_what_exact_search_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subset: int) -> None:
    """With all lists; so do filters, through the structure and past it."""
    monkeypatch.setattr(shard_module, "EXACT_SUBSET", subset)
    items, vectors = clustered()
    index = PublishedIndex.open(write_version(tmp_path, 1, items, vectors, lists=16))
    queries = vectors["caption"][::151]
    some_numbers = parse_filter({"number": {"gte": 1000, "lt": 2500}}, index.filter_schema)
    whole, part = index.search(queries, 10), index.search(queries, 10, filter=some_numbers)
    for query, matches, some in zip(queries, whole, part, strict=True):
        assert [match.id for match in matches] == best_ids(vectors["image"], query, 10)
        assert [match.id for match in some] == best_ids(vectors["image"], query, 10, np.arange(1000, 2500))


def test_gate_chooses_the_fewest_lists_that_pass(tmp_path: Path) -> None:
    items, vectors = clustered()
    index = PublishedIndex.open(write_version(tmp_path, 1, items, vectors, lists=50))
    table = measure_probes(index, "image", {"text": vectors["caption"][:200], "image": vectors["image"][:200]})
    texts = {row["probes"]: row["recall"] for row in table if row["queries"] == "text"}
    images = {row["probes"]: row["recall"] for row in table if row["queries"] == "image"}
    assert list(texts) == [1, 2, 4, 8, 16, 32, 50]
    assert sorted(texts.values()) == list(texts.values())
    assert texts[50] == images[50] == 1
    assert texts[1] < images[1], "texts are farther from the lists than images"
    chosen = fewest_probes(table, "image", 0.95)
    assert texts[chosen] >= 0.95
    assert all(recall < 0.95 for probes, recall in texts.items() if probes < chosen)
    with pytest.raises(SearchIndexError, match=r"less than min_recall=0\.95"):
        fewest_probes([row | {"recall": 0.9} for row in table], "image", 0.95)


# ---- filters

SCHEMA = {"year": pa.int64(), "place": pa.string(), "price": pa.float64(), "sold": pa.bool_()}
TABLE = pa.table(
    {
        "year": [1990, 1995, None, 2001],
        "place": ["Oslo", "Rome", "Oslo", None],
        "price": [1.5, None, 2.0, 0.5],
        "sold": [True, False, None, True],
    },
    schema=pa.schema(list(SCHEMA.items())),
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ({"year": {"gte": 1990, "lt": 2000}}, [0, 1]),
        ({"year": {"ne": 1990}}, [1, 3]),
        ({"place": {"in": ["Rome", "Bonn"]}}, [1]),
        ({"price": {"gt": 1}}, [0, 2]),
        ({"sold": {"eq": True}}, [0, 3]),
        ({"year": {"lte": 1995}, "place": {"eq": "Oslo"}}, [0]),
        ({"or": [{"place": {"eq": "Rome"}}, {"sold": {"eq": True}}]}, [0, 1, 3]),
        ({"not": {"place": {"eq": "Oslo"}}}, [1]),
        ({"not": {"place": {"in": ["Oslo"]}}}, [1]),
        ({"and": [{"year": {"gt": 0}}, {"not": {"sold": {"eq": False}}}]}, [0, 3]),
        ({"place": {"eq": "x' OR 1=1 --"}}, []),
    ],
)
def test_filters(condition: dict, rows: list[int]) -> None:
    assert np.flatnonzero(parse_filter(condition, SCHEMA).mask(TABLE)).tolist() == rows


def nested(depth: int) -> dict:
    return {"not": nested(depth - 1)} if depth else {"year": {"eq": 1}}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({}, "must be an object"),
        ("year > 1990", "must be an object"),
        ({"color": {"eq": 1}}, "column 'color' does not exist"),
        ({"year; DROP TABLE": {"eq": 1}}, "does not exist; columns to filter by"),
        ({"year": 1990}, "takes an object"),
        ({"year": {"like": 1990}}, "'like' is not one of eq, ne"),
        ({"year": {"eq": "1990"}}, "holds int64, it cannot be compared with '1990'"),
        ({"year": {"eq": True}}, "cannot be compared with True"),
        ({"year": {"eq": 1990.5}}, "cannot be compared"),
        ({"year": {"eq": 2**70}}, "cannot be compared"),
        ({"year": {"eq": None}}, "cannot be compared"),
        ({"place": {"in": []}}, "a list of 1 to"),
        ({"place": {"in": "Oslo"}}, "a list of 1 to"),
        ({"or": []}, "'or' takes a list"),
        ({"and": {"year": {"eq": 1}}}, "'and' takes a list"),
        (nested(MAX_DEPTH + 1), "nested deeper"),
        ({"or": [{"year": {"eq": n}} for n in range(MAX_CONDITIONS + 1)]}, "more than"),
        ({"x" * 5000: {"eq": 1}}, "does not exist; columns to filter by"),
    ],
)
def test_filter_errors_are_one_short_line(condition: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        parse_filter(condition, SCHEMA)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


# ---- what is refused


@pytest.mark.parametrize("name", ["image.npy", "caption.npy", "items.arrow"])
def test_a_tampered_or_missing_file_is_refused(version: Path, name: str) -> None:
    path = version / "0000" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SearchIndexError, match=rf"sha256 of {name}"):
        PublishedIndex.open(version)
    path.unlink()
    with pytest.raises(SearchIndexError, match=name) as refused:
        PublishedIndex.open(version)
    assert "\n" not in str(refused.value)


def test_a_tampered_structure_is_refused(tmp_path: Path) -> None:
    items, vectors = clustered(500)
    version = write_version(tmp_path, 1, items, vectors, lists=4)
    data = bytearray((version / "0000" / "image.faiss").read_bytes())
    data[len(data) // 2] ^= 1
    (version / "0000" / "image.faiss").write_bytes(data)
    with pytest.raises(SearchIndexError, match=r"sha256 of image\.faiss"):
        PublishedIndex.open(version)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest_version": 1}, "manifest_version 1, this release reads 2"),
        ({"count": 5}, "has 4 items, its manifest says 5"),
        ({"embedding_dim": 25}, r"not float32 \[4, 25\]"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(version: Path, changes: dict, message: str) -> None:
    change_manifest(version, **changes)
    with pytest.raises(SearchIndexError, match=message):
        PublishedIndex.open(version)


def test_manifests_must_be_complete(version: Path) -> None:
    (version / "manifest.json").write_text('{"manifest_version": 2, "count": 4}')
    with pytest.raises(SearchIndexError, match="lacks version, checkpoint_id, embedding_dim"):
        read_manifest(version)
    (version / "manifest.json").write_text("{")
    with pytest.raises(SearchIndexError, match=r"cannot read manifest\.json"):
        read_manifest(version)
    (version / "manifest.json").unlink()
    with pytest.raises(SearchIndexError, match=r"has no manifest\.json"):
        read_manifest(version)
    assert version_manifests(version.parent.parent) == [], "a version without a manifest is none yet"


def test_vectors_must_be_of_unit_length(tmp_path: Path) -> None:
    items, vectors = clustered(4)
    vectors["image"][1] *= 2
    vectors["image"][3] = np.nan
    with pytest.raises(SearchIndexError, match=r"2 vectors of image\.npy are not of unit length, first row 1"):
        PublishedIndex.open(write_version(tmp_path, 1, items, vectors))


@pytest.mark.parametrize(
    ("ids", "message"), [(["a", "a", "b", "b"], "2 ids occur more than once"), (["a", None, "b", "c"], "nulls")]
)
def test_ids_must_name_items(tmp_path: Path, ids: list[str | None], message: str) -> None:
    items, vectors = clustered(4)
    items = items.set_column(0, "id", pa.array(ids, pa.string()))
    with pytest.raises(SearchIndexError, match=message):
        PublishedIndex.open(write_version(tmp_path, 1, items, vectors))


def test_newest_version_of_the_model_is_chosen(tmp_path: Path) -> None:
    items, vectors = clustered(4)
    for number, model in ((1, "a"), (2, "b"), (3, "a"), (4, "b")):
        write_version(tmp_path, number, items, vectors, checkpoint_id=model)
    shutil.rmtree(tmp_path / "published" / "000004" / "0000")
    (tmp_path / "published" / "000004" / "manifest.json").unlink()
    manifests = version_manifests(tmp_path)
    assert [manifest.version for manifest in manifests] == [1, 2, 3]
    assert newest_version(manifests, "a", "x").version == 3
    assert newest_version(manifests, "b", "x").version == 2
    with pytest.raises(SearchIndexError, match=r"made with checkpoint a \(version 3\), the model is c"):
        newest_version(manifests, "c", "x")
    with pytest.raises(SearchIndexError, match="no published version"):
        newest_version([], "c", "x")
