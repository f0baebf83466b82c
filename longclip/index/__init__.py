"""A search index: a table of vectors, and immutable search structures that are published from it.

    INDEX/table.lance/            every item with its vectors, and the model that made them: inserted, changed, deleted
    INDEX/published/000007/       one version of it, prepared for search, never changed
        manifest.json             written last: the model, counts, checksums, measured recall
        0000/items.arrow          ids, captions, thumbnails, metadata of a shard
        0000/image.npy            its vectors of images; caption.npy those of captions
        0000/image.faiss          a FAISS structure, if there are too many vectors to compare all

Needs the packages of the extra `index`: pyarrow, and faiss-cpu for large indexes.
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
