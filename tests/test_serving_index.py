"""The index directory of the serving application: read, verified, searched. Also writes one for the other tests."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from longclip.checkpoint import Checkpoint, checkpoint_id, file_sha256
from longclip.encode import encode_image, encode_text, unit
from longclip.tokenizer import tokenize
from serving.index import SearchIndex, SearchIndexError, best_rows, check_model, read_manifest

COUNT = 30
COLOURS = ("firebrick", "goldenrod", "seagreen", "steelblue", "slategray", "orchid")


def scene(seed: int) -> tuple[bytes, str]:
    """A drawn picture as PNG, and its caption."""
    random = np.random.default_rng(seed)
    ground, *inks = random.permutation(COLOURS)[:4].tolist()
    image = Image.new("RGB", (96, 72), ground)
    draw = ImageDraw.Draw(image)
    sentences = [f"Scene {seed} lies on a {ground} ground."]
    for ink in inks:
        x, y, size = (int(value) for value in random.integers((4, 4, 14), (60, 40, 32)))
        kind = ("disc", "square")[int(random.integers(2))]
        box = (x, y, x + size, y + size)
        (draw.ellipse if kind == "disc" else draw.rectangle)(box, fill=ink)
        half = "left" if x < 35 else "right"
        sentences.append(f"A {ink} {kind}, {size} pixels wide, is seen in the {half} half of the picture.")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue(), " ".join(sentences)


def library_text_embedding(checkpoint: Checkpoint, *texts: str) -> np.ndarray:
    """`[N, E]` as the library alone computes it."""
    with torch.inference_mode():
        return unit(encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, texts))).numpy()


def library_image_embedding(checkpoint: Checkpoint, *images: bytes) -> np.ndarray:
    """`[N, E]` as the library alone computes it."""
    pixels = torch.from_numpy(np.stack([checkpoint.transform.pixels(image) for image in images]))
    with torch.inference_mode():
        return unit(encode_image(checkpoint.model, checkpoint.transform.normalize(pixels))).numpy()


def write_index(directory: Path, checkpoint: Checkpoint, checkpoint_dir: Path, count: int = COUNT) -> Path:
    """An index of `count` scenes, in the format that the embed pipeline writes."""
    directory.mkdir()
    scenes = [scene(seed) for seed in range(count)]
    embeddings = library_image_embedding(checkpoint, *(image for image, _ in scenes))
    np.save(directory / "embeddings.npy", embeddings)
    items = {
        "id": [f"scene/{seed}" for seed in range(count)],
        "caption": [caption for _, caption in scenes],
        "thumbnail": [_as_jpeg(image) for image, _ in scenes],
    }
    pq.write_table(pa.table(items), directory / "items.parquet")
    write_manifest(directory, checkpoint_id=checkpoint_id(checkpoint_dir), embedding_dim=embeddings.shape[1])
    return directory


def write_manifest(directory: Path, **changes: object) -> None:
    """The manifest of the files as they lie there, with `changes`."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest |= {
        "manifest_version": 1,
        "context_length": 248,
        "count": len(np.load(directory / "embeddings.npy")),
        "source": "scenes",
        "created": "2026-01-01T00:00:00Z",
        "sha256": {name: file_sha256(directory / name) for name in ("embeddings.npy", "items.parquet")},
    }
    path.write_text(json.dumps(manifest | changes))


def _as_jpeg(image: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(image)).save(out, "JPEG", quality=90)
    return out.getvalue()


@pytest.fixture
def index_dir(tmp_path: Path, tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path) -> Path:
    return write_index(tmp_path / "index", tiny_checkpoint, tiny_checkpoint_dir, count=4)


def test_an_index_finds_its_own_rows(index_dir: Path) -> None:
    index = SearchIndex.open(index_dir)
    vector = index.vector("scene/2")
    assert vector is not None
    matches = index.search(vector[None], top_k=9)[0]
    assert [len(matches), matches[0].id] == [4, "scene/2"]
    assert matches[0].score == pytest.approx(1, abs=1e-5)
    assert index.vector("scene/9") is None
    assert index.thumbnail("scene/9") is None
    assert (index.thumbnail("scene/0") or b"").startswith(b"\xff\xd8")
    assert len(index.examples(2)) == 2
    assert len(index.examples(99)) == 4


def test_best_rows_break_ties_by_row_order() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.9, 0.5, -1], np.float32)
    assert best_rows(scores, 1) == [1]
    assert best_rows(scores, 4) == [1, 3, 0, 2]
    assert best_rows(scores, 100) == [1, 3, 0, 2, 4, 5]
    assert best_rows(scores[:0], 3) == []


def test_best_rows_agree_with_a_full_sort() -> None:
    scores = np.random.default_rng(0).integers(0, 50, 1000).astype(np.float32)
    for top_k in (1, 7, 100, 1000):
        assert best_rows(scores, top_k) == np.argsort(-scores, kind="stable")[:top_k].tolist()


@pytest.mark.parametrize("name", ["embeddings.npy", "items.parquet"])
def test_a_tampered_index_is_refused(index_dir: Path, name: str) -> None:
    data = bytearray((index_dir / name).read_bytes())
    data[-1] ^= 1
    (index_dir / name).write_bytes(data)
    with pytest.raises(SearchIndexError, match=rf"sha256 of {name}"):
        SearchIndex.open(index_dir)


@pytest.mark.parametrize("name", ["manifest.json", "embeddings.npy", "items.parquet"])
def test_a_missing_file_is_named(index_dir: Path, name: str) -> None:
    (index_dir / name).unlink()
    with pytest.raises(SearchIndexError, match=name) as refused:
        SearchIndex.open(index_dir)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest_version": 2}, "manifest_version 2"),
        ({"count": 5}, r"not float32 \[5, 24\]"),
        ({"embedding_dim": 25}, r"not float32 \[4, 25\]"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(index_dir: Path, changes: dict, message: str) -> None:
    write_manifest(index_dir, **changes)
    with pytest.raises(SearchIndexError, match=message):
        SearchIndex.open(index_dir)


def test_manifest_fields_are_required(index_dir: Path) -> None:
    (index_dir / "manifest.json").write_text('{"manifest_version": 1, "count": 4}')
    with pytest.raises(SearchIndexError, match="lacks checkpoint_id, embedding_dim"):
        read_manifest(index_dir)
    (index_dir / "manifest.json").write_text("{")
    with pytest.raises(SearchIndexError, match=r"cannot read manifest\.json"):
        read_manifest(index_dir)


def test_vectors_must_be_of_unit_length(index_dir: Path) -> None:
    embeddings = np.load(index_dir / "embeddings.npy")
    embeddings[1] *= 2
    embeddings[3] = np.nan
    np.save(index_dir / "embeddings.npy", embeddings)
    write_manifest(index_dir)
    with pytest.raises(SearchIndexError, match="2 vectors are not of unit length, first row 1"):
        SearchIndex.open(index_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items.slice(1), "has 3 rows, not 4"),
        (lambda items: items.drop_columns("caption"), "cannot be read"),
        (lambda items: items.set_column(0, "id", pa.array(["a", "a", "b", "b"])), "2 ids occur more than once"),
        (lambda items: items.set_column(0, "id", pa.array(["a", None, "b", "c"])), "nulls"),
    ],
)
def test_items_must_fit(index_dir: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    pq.write_table(change(pq.read_table(index_dir / "items.parquet")), index_dir / "items.parquet")
    write_manifest(index_dir)
    with pytest.raises(SearchIndexError, match=message):
        SearchIndex.open(index_dir)


def test_an_index_of_another_model_is_refused(index_dir: Path) -> None:
    manifest = read_manifest(index_dir)
    check_model(index_dir, manifest, manifest.checkpoint_id)
    with pytest.raises(SearchIndexError, match=f"made with checkpoint {manifest.checkpoint_id}, the model is 0123"):
        check_model(index_dir, manifest, "0123")
