"""A published version of an index, or a shard of it, opened for search."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longclip.index.filters import Filter
from longclip.index.manifest import Manifest, SearchIndexError, read_manifest
from longclip.index.shard import ITEM_COLUMNS, Shard


@dataclass(frozen=True)
class Match:
    """An item that answers a query."""

    id: str
    score: float
    caption: str
    metadata: dict[str, Any] = field(default_factory=dict)


class PublishedIndex:
    """Shards of a published version in this process."""

    def __init__(self, manifest: Manifest, shards: Sequence[Shard]) -> None:
        self.manifest = manifest
        self.shards = shards
        self.filter_schema: dict[str, pa.DataType] = {
            field.name: field.type for field in shards[0].items.schema if field.name not in ITEM_COLUMNS
        }
        """Types of the columns that can be filtered by."""
        self._rows: dict[str, tuple[int, int]] = {
            id: (number, row)
            for number, shard in enumerate(shards)
            for row, id in enumerate(shard.items["id"].to_pylist())
        }

    @classmethod
    def open(cls, directory: str | Path, manifest: Manifest | None = None) -> "PublishedIndex":
        """Open and verify a published version on this machine.

        Args:
            directory: `INDEX/published/N`.
            manifest: its manifest, if it is not written yet.

        Raises:
            SearchIndexError: it is missing or damaged.
        """
        directory = Path(directory)
        manifest = manifest or read_manifest(directory)
        opened = [
            Shard.open(directory / shard_name(number), entry, manifest.embedding_dim)
            for number, entry in enumerate(manifest.shards)
        ]
        index = cls(manifest, opened)
        count = sum(len(shard) for shard in opened)
        if len(index._rows) != count:
            raise SearchIndexError(f"index '{directory}': {count - len(index._rows)} ids occur more than once")
        if count != manifest.count:
            raise SearchIndexError(f"index '{directory}' has {count} items, its manifest says {manifest.count}")
        return index

    @classmethod
    def open_shard(cls, directory: str | Path, manifest: Manifest, number: int) -> "PublishedIndex":
        """Open one shard of a version, as an index of its items alone.

        Args:
            directory: the shard's directory.
            manifest: the manifest of the version.
            number: number of the shard, from 0.

        Raises:
            SearchIndexError: it is missing or damaged.
        """
        return cls(manifest, [Shard.open(Path(directory), manifest.shards[number], manifest.embedding_dim)])

    def search(
        self,
        queries: np.ndarray,
        top_k: int,
        target: str = "image",
        filter: Filter | None = None,
        exact: bool = False,
        probes: int | None = None,
    ) -> list[list[Match]]:
        """The best items for each query, best first; of equal scores the earlier one first.

        Args:
            queries: `[Q, E]` float32 unit vectors.
            top_k: maximum matches per query.
            target: `image` or `caption`, if the index has such vectors.
            filter: items to search; None searches all.
            exact: compare with every item, even if there is a structure.
            probes: inverted lists to probe; None uses the number chosen when the index was published.
        """
        probes = None if exact else probes or self.manifest.engine.get("probes", {}).get(target)
        parts = []
        for shard in self.shards:
            mask = None if filter is None else filter.mask(shard.items)
            best = shard.search(queries, target, top_k, mask, probes)
            parts.append(
                [
                    [self._match(shard, row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]
                    for rows, scores in zip(best.rows, best.scores, strict=True)
                ]
            )
        return [merge_matches(list(lists), top_k) for lists in zip(*parts, strict=True)]

    def _match(self, shard: Shard, row: int, score: float) -> Match:
        metadata = {name: shard.items[name][row].as_py() for name in self.filter_schema}
        return Match(shard.items["id"][row].as_py(), score, shard.items["caption"][row].as_py(), metadata)

    def vector(self, id: str, target: str = "image") -> np.ndarray | None:
        """The unit vector `[E]` of an item; None for an unknown id."""
        place = self._rows.get(id)
        return None if place is None else np.array(self.shards[place[0]].vectors[target][place[1]])

    def thumbnail(self, id: str) -> bytes | None:
        """The JPEG of an item; None for an unknown id."""
        place = self._rows.get(id)
        return None if place is None else self.shards[place[0]].items["thumbnail"][place[1]].as_py()

    def examples(self, count: int) -> list[str]:
        """At most `count` different captions, spread evenly over the first shard."""
        captions = self.shards[0].items["caption"]
        rows = np.linspace(0, len(captions) - 1, min(count, len(captions)), dtype=int)
        texts = (captions[row].as_py() for row in rows.tolist())
        return list(dict.fromkeys(caption for caption in texts if caption.strip()))


def shard_name(number: int) -> str:
    """Name of a shard's directory."""
    return f"{number:04d}"


def merge_matches(lists: Sequence[list[Match]], top_k: int) -> list[Match]:
    """The best of several lists of matches, each best first; of equal scores those of the earlier list first."""
    return sorted((match for matches in lists for match in matches), key=lambda match: -match.score)[:top_k]
