"""A search index: a table of vectors as the truth, and immutable search structures that are published from it.

    INDEX/table.lance/            every item with its vectors, and the model that made them: inserted, changed, deleted
    INDEX/published/000007/       one state of it, made ready for search, never changed
        manifest.json             written last: the model, counts, checksums, how search was found to be good
        0000/items.arrow          ids, captions, thumbnails, metadata of a shard
        0000/image.npy            its vectors of images; caption.npy those of captions
        0000/image.faiss          a structure over them, where there are too many to compare all

Needs numpy and pyarrow; `faiss-cpu` where an index is large, `pylance` to write one: the extra `index`.
"""

from longclip.index.filters import Filter, parse_filter
from longclip.index.manifest import (
    MANIFEST,
    Manifest,
    SearchIndexError,
    newest_version,
    parse_manifest,
    read_manifest,
    version_directory,
    version_manifests,
)
from longclip.index.published import Match, PublishedIndex, merge_matches, shard_name

__all__ = [
    "MANIFEST",
    "Filter",
    "Manifest",
    "Match",
    "PublishedIndex",
    "SearchIndexError",
    "merge_matches",
    "newest_version",
    "parse_filter",
    "parse_manifest",
    "read_manifest",
    "shard_name",
    "version_directory",
    "version_manifests",
]
