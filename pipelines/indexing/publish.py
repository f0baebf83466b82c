"""Publishing the table of an index as a version: Ray tasks build shards, recall is checked, the manifest comes last."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from upath import UPath

from longclip.errors import DataError
from longclip.index import version_manifests
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
from pipelines.common.storage import Storage, is_local, open_path
from pipelines.common.whole_files import make_directory, remove, write_whole
from pipelines.indexing.settings import PublishSettings
from pipelines.indexing.table import CONTENT, MODEL, IndexTable, read_rows, vector_column

if TYPE_CHECKING:  # the tasks that build shards do not need torch
    from longclip.checkpoint import Checkpoint

READ_ROWS = 8192


def publish_changes(
    index: UPath,
    table: IndexTable,
    settings: PublishSettings,
    checkpoint: "Checkpoint",
    checkpoint_id: str,
    source: str | None,
) -> str:
    """Publish the table, unless the newest version is the same already.

    Args:
        index: place of the index.
        table: its table.
        settings: how to publish.
        checkpoint: model of the vectors.
        checkpoint_id: its id.
        source: where the items came from; None keeps what the newest version says.

    Returns:
        What was done, for the closing line of the job.

    Raises:
        DataError: the table is empty, or has vectors of another model.
    """
    states = table.states()
    if not states:
        raise DataError(f"output='{index}' has no items: none of the rows has a readable image, or all were deleted")
    others = [id for id, (_, model) in states.items() if model != checkpoint_id]
    if others:
        raise DataError(
            f"output='{index}': {len(others)} of {len(states)} items, the first '{others[0]}', were made with another"
            f" {MODEL} than {checkpoint_id}, and one version holds vectors of one model; embed the data that has them,"
            " or delete them with --set delete_missing=true"
        )
    newest = next(reversed(version_manifests(index)), None)
    if newest and (newest.table_version, newest.checkpoint_id) == (table.version, checkpoint_id):
        return f"version {newest.version} as before, {newest.count} items"
    facts = {
        "checkpoint_id": checkpoint_id,
        "embedding_dim": checkpoint.model.config.projection_dim,
        "context_length": checkpoint.context_length,
        "source": source or (newest.source if newest else ""),
    }
    manifest = publish(index, table, settings, facts)
    return f"version {manifest.version} published, {manifest.count} items, engine {manifest.engine['name']}"


def publish(index: UPath, table: IndexTable, settings: PublishSettings, facts: dict[str, Any]) -> Manifest:
    """Publish the current state of a table as a new version, which readers see once its manifest is written.

    Args:
        index: the index.
        table: its table, with vectors of one model.
        settings: how to publish.
        facts: `checkpoint_id`, `embedding_dim`, `context_length`, `source` of the manifest.

    Raises:
        SearchIndexError: the recall of its search structure is below `min_recall`.
    """
    place = version_directory(index, _next_number(index))
    count, rows = table.sorted_rows()
    parts = np.array_split(rows, -(-count // settings.shard_rows))
    largest = max(len(part) for part in parts)
    lists = int(4 * largest**0.5) if largest > settings.exact_rows else 0
    build = ray.remote(num_cpus=1)(_build_shard)
    shards = [
        build.remote(
            table.uri, table.options, table.version, part, str(place / shard_name(number)), table.storage, lists
        )
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
            manifest = _with_probes(PublishedIndex.open(directory, manifest=manifest), settings)
    content = json.dumps({"manifest_version": MANIFEST_VERSION, **asdict(manifest)}, indent=2)
    write_whole(place / MANIFEST, f"{content}\n".encode())
    table.tag(f"published-{place.name}")
    return manifest


def _next_number(index: UPath) -> int:
    """Number of a new version. Removes versions without a manifest, which killed runs left."""
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
    """Read the items of a shard from the table and write its files; returns its entry in the manifest."""
    path = open_path("output", place, storage)
    remove(path)  # left by a killed task

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
    """A directory on this machine with the files of `place`."""
    if is_local(place):
        yield Path(place.path)
        return
    with tempfile.TemporaryDirectory() as directory:
        place.fs.get(f"{place.path}/", f"{directory}/", recursive=True)
        yield Path(directory)


def _with_probes(index: PublishedIndex, settings: PublishSettings) -> Manifest:
    """The manifest with the fewest probes that reach `min_recall`, and the measurements; raises `SearchIndexError`."""
    if "caption" not in index.manifest.targets:
        raise SearchIndexError(
            f"exact_rows={settings.exact_rows} makes this index approximate, which is checked with text queries, but"
            " it has no caption vectors; set caption_vectors=true, or raise exact_rows"
        )
    table, probes = [], {}
    queries = {kind: _sample(index, target, settings) for kind, target in (("text", "caption"), ("image", "image"))}
    for target in index.manifest.targets:
        table += measure_probes(index, target, queries)
        probes[target] = fewest_probes(table, target, settings.min_recall)
    return replace(index.manifest, engine=index.manifest.engine | {"probes": probes}, gate=table)


def _sample(index: PublishedIndex, target: str, settings: PublishSettings) -> np.ndarray:
    """Vectors of a random sample of items, with the same share from each shard."""
    share = settings.gate_queries / index.manifest.count
    samples = []
    for number, shard in enumerate(index.shards):
        rows = np.random.default_rng(number).permutation(len(shard))[: max(1, round(share * len(shard)))]
        samples.append(shard.vectors[target][np.sort(rows)])
    return np.concatenate(samples)
