"""Is a structure good enough to be searched with? Measured before an index is published.

Texts are no neighbours of images: their vectors lie elsewhere, and a structure that finds every image for an image may
lose a tenth of them for a text (arXiv 2211.12850). So the gate asks with texts; images are measured beside them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longclip.index.manifest import SearchIndexError
from longclip.index.published import PublishedIndex

TOP_K = 10


def measure_probes(index: PublishedIndex, target: str, queries: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Recall of the ten best for powers of two of lists that are looked into, up to all of them.

    Args:
        index: all shards, with structures.
        target: what is searched.
        queries: unit vectors `[Q, E]` by kind: `text`, `image`.

    Returns:
        Rows of `target`, `queries`, `count`, `probes`, and `recall`: the share of the truly ten best that are found.
    """
    lists = int(index.manifest.engine["lists"])
    steps = [1 << power for power in range(lists.bit_length()) if 1 << power < lists] + [lists]
    rows = []
    for kind, vectors in queries.items():
        best = [_ids(matches) for matches in index.search(vectors, TOP_K, target, exact=True)]
        for probes in steps:
            found = [_ids(matches) for matches in index.search(vectors, TOP_K, target, probes=probes)]
            recall = np.mean([len(one & other) / len(one) for one, other in zip(best, found, strict=True)])
            row = {"target": target, "queries": kind, "count": len(vectors), "probes": probes}
            rows.append(row | {"recall": round(float(recall), 4)})
    return rows


def fewest_probes(table: list[dict[str, Any]], target: str, min_recall: float) -> int:
    """The fewest lists with which texts find enough of what there is.

    Raises:
        SearchIndexError: no number of lists is enough.
    """
    texts = [row for row in table if (row["target"], row["queries"]) == (target, "text")]
    enough = [row["probes"] for row in texts if row["recall"] >= min_recall]
    if not enough:
        best = max(row["recall"] for row in texts)
        raise SearchIndexError(
            f"the structure finds {best:.4f} of the ten best of '{target}' for texts, less than min_recall={min_recall}"
            " with all of its lists; nothing is published: lower min_recall, or raise exact_rows to search exactly"
        )
    return min(enough)


def _ids(matches: list[Any]) -> set[str]:
    return {match.id for match in matches}
