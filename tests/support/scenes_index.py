"""Drawn scenes, their embeddings as the library alone computes them, and a published index of them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw

from longclip.checkpoint import Checkpoint, checkpoint_id
from longclip.encode import encode_image, encode_text, unit
from longclip.index import shard_name
from longclip.index.manifest import MANIFEST, MANIFEST_VERSION, PUBLISHED
from longclip.index.shard import write_shard
from longclip.tokenizer import tokenize

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


def write_index(
    directory: Path, checkpoint: Checkpoint, checkpoint_dir: Path, count: int = COUNT, shards: int = 1
) -> Path:
    """An index of `count` scenes with one published version, in the format that the embed pipeline writes."""
    scenes = [scene(seed) for seed in range(count)]
    vectors = {
        "image": library_image_embedding(checkpoint, *(image for image, _ in scenes)),
        "caption": library_text_embedding(checkpoint, *(caption for _, caption in scenes)),
    }
    items = {
        "id": [f"scene/{seed}" for seed in range(count)],
        "caption": [caption for _, caption in scenes],
        "thumbnail": [_as_jpeg(image) for image, _ in scenes],
        "number": list(range(count)),
        "parity": [None if seed == 0 else ("even", "odd")[seed % 2] for seed in range(count)],
    }
    write_version(directory, 1, pa.table(items), vectors, shards=shards, checkpoint_id=checkpoint_id(checkpoint_dir))
    return directory


def write_version(
    index: Path,
    number: int,
    items: pa.Table,
    vectors: dict[str, np.ndarray],
    lists: int = 0,
    shards: int = 1,
    **changes: object,
) -> Path:
    """A published version, its manifest with `changes`; gives its directory."""
    directory = index / PUBLISHED / f"{number:06d}"
    entries = []
    for shard, rows in enumerate(np.array_split(np.arange(items.num_rows), shards)):
        part = {target: values[rows] for target, values in vectors.items()}
        (directory / shard_name(shard)).mkdir(parents=True)
        entries.append(write_shard(directory / shard_name(shard), [(items.take(rows), part)], len(rows), lists))
    engine = {"name": "ivf", "lists": lists, "probes": dict.fromkeys(vectors, lists)} if lists else {"name": "exact"}
    schema = {field.name: str(field.type) for field in items.schema}
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "version": number,
        "checkpoint_id": "0" * 16,
        "embedding_dim": next(iter(vectors.values())).shape[1],
        "context_length": 248,
        "count": items.num_rows,
        "shards": entries,
        "engine": engine,
        "gate": [],
        "metadata": {name: kind for name, kind in schema.items() if name not in ("id", "caption", "thumbnail")},
        "source": "scenes",
        "table_version": 1,
        "created": "2026-01-01T00:00:00+00:00",
    }
    (directory / MANIFEST).write_text(json.dumps(manifest | changes))
    return directory


def change_manifest(directory: Path, **changes: object) -> None:
    """Change what the manifest of a version says."""
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _as_jpeg(image: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(image)).save(out, "JPEG", quality=90)
    return out.getvalue()
