"""Publishing a state of an index's table: shards built by Ray tasks, the gate, the manifest at the end."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pydantic import Field, PositiveInt
from upath import UPath

from longclip.index.gate import fewest_probes, measure_probes
from longclip.index.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    PUBLISHED,
    TARGETS,
    Manifest,
    SearchIndexError,
    version_directory,
)
from longclip.index.published import PublishedIndex, shard_name
from longclip.index.shard import write_shard
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage, is_local, open_path
from pipelines.common.whole_files import make_directory, remove, write_whole
from pipelines.indexing.table import CONTENT, MODEL, IndexTable, read_rows, vector_column

READ_ROWS = 8192


class PublishSettings(Settings):
    """How an index is made ready for search."""

    exact_rows: PositiveInt = 200_000
    """Shards of at most so many items are searched by comparing all of them."""
    shard_rows: PositiveInt = 2_000_000
    """Most items of a shard. Shards are built, and may be searched, on different machines."""
    min_recall: float = Field(default=0.95, ge=0, le=1)
    """Share of the truly ten best that texts must find, or nothing is published."""
    gate_queries: PositiveInt = 1000
    """Items whose captions and images are the queries of that measurement."""


def publish(
    index: UPath, storage: Storage, table: IndexTable, settings: PublishSettings, facts: dict[str, Any]
) -> Manifest:
    """Publish the present state of a table as a new version. Until its manifest is there, nobody sees it.

    Args:
        index: the index.
        storage: how it is reached.
        table: its table, whose items were all made with one model.
        settings: how.
        facts: `checkpoint_id`, `embedding_dim`, `context_length`, `source` of the manifest.

    Raises:
        SearchIndexError: search in it would find too little.
    """
    place = version_directory(index, _next_number(index))
    count, rows = table.sorted_rows()
    parts = np.array_split(rows, -(-count // settings.shard_rows))
    largest = max(len(part) for part in parts)
    lists = int(4 * largest**0.5) if largest > settings.exact_rows else 0
    build = ray.remote(num_cpus=1)(_build_shard)
    shards = [
        build.remote(table.uri, table.options, table.version, part, str(place / shard_name(number)), storage, lists)
        for number, part in enumerate(parts)
    ]
    manifest = Manifest(
        version=int(place.name),
        count=count,
        shards=ray.get(shards),
        engine={"name": "ivf", "lists": lists} if lists else {"name": "exact"},
        gate=[],
        metadata=table.metadata,
        table_version=table.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    )
    if lists:
        with local_copy(place) as directory:
            manifest = _through_the_gate(PublishedIndex.open(directory, manifest=manifest), settings)
    content = json.dumps({"manifest_version": MANIFEST_VERSION, **asdict(manifest)}, indent=2)
    write_whole(place / MANIFEST, f"{content}\n".encode())
    table.tag(f"published-{place.name}")
    return manifest


def _next_number(index: UPath) -> int:
    """Number of a new version; what a killed run left without a manifest is removed."""
    folder = index / PUBLISHED
    numbers = [0]
    for path in list(folder.iterdir()) if folder.exists() else []:
        numbers.append(int(path.name))
        if not (path / MANIFEST).exists():
            remove(path)
    return max(numbers) + 1


def _build_shard(
    uri: str, options: dict[str, str], version: int, rows: np.ndarray, place: str, storage: Storage, lists: int
) -> dict[str, Any]:
    """Read a shard's items from the table and put its files in their place; gives its entry in the manifest."""
    path = open_path("output", place, storage)
    remove(path)  # of a task that was killed

    def batches() -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
        for start in range(0, len(rows), READ_ROWS):
            items = read_rows(uri, options, version, rows[start : start + READ_ROWS]).combine_chunks()
            vectors = {}
            for target in TARGETS:
                if (name := vector_column(target)) in items.schema.names:
                    vectors[target] = items[name].chunk(0).flatten().to_numpy().reshape(items.num_rows, -1)
                    items = items.drop_columns([name])
            yield items.drop_columns([CONTENT, MODEL]), vectors

    if is_local(path):
        make_directory(path)
        return write_shard(Path(path.path), batches(), len(rows), lists)
    with tempfile.TemporaryDirectory() as aside:
        entry = write_shard(Path(aside), batches(), len(rows), lists)
        for name in entry["files"]:
            path.fs.put_file(f"{aside}/{name}", f"{path.path}/{name}")
    return entry


@contextmanager
def local_copy(place: UPath) -> Iterator[Path]:
    """A directory on this machine with what lies at a place."""
    if is_local(place):
        yield Path(place.path)
        return
    with tempfile.TemporaryDirectory() as directory:
        place.fs.get(f"{place.path}/", f"{directory}/", recursive=True)
        yield Path(directory)


def _through_the_gate(index: PublishedIndex, settings: PublishSettings) -> Manifest:
    """The manifest with as many probes as it takes, and what was measured; raises `SearchIndexError`."""
    if "caption" not in index.manifest.targets:
        raise SearchIndexError(
            f"exact_rows={settings.exact_rows} asks for a structure, which is measured with texts, but the index has no"
            " vectors of captions; set caption_vectors=true, or raise exact_rows"
        )
    table, probes = [], {}
    queries = {kind: _sample(index, target, settings) for kind, target in (("text", "caption"), ("image", "image"))}
    for target in index.manifest.targets:
        table += measure_probes(index, target, queries)
        probes[target] = fewest_probes(table, target, settings.min_recall)
    return replace(index.manifest, engine=index.manifest.engine | {"probes": probes}, gate=table)


def _sample(index: PublishedIndex, target: str, settings: PublishSettings) -> np.ndarray:
    """Vectors of some items, drawn from all shards alike."""
    share = settings.gate_queries / index.manifest.count
    drawn = []
    for number, shard in enumerate(index.shards):
        rows = np.random.default_rng(number).permutation(len(shard))[: max(1, round(share * len(shard)))]
        drawn.append(shard.vectors[target][np.sort(rows)])
    return np.concatenate(drawn)
