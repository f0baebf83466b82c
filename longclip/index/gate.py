"""Measures whether a search structure is good enough before an index is published.

Text vectors are far from image vectors: a structure that finds every image for an image query may miss a tenth of them
for a text query (arXiv 2211.12850). So the gate uses text queries; image queries are measured as well.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longclip.index.manifest import SearchIndexError
from longclip.index.published import PublishedIndex

TOP_K = 10


def measure_probes(index: PublishedIndex, target: str, queries: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Recall of the ten best items when 1, 2, 4, ... and all inverted lists are probed.

    Args:
        index: all shards, with structures.
        target: what is searched, `image` or `caption`.
        queries: unit vectors `[Q, E]` by kind: `text`, `image`.

    Returns:
        Rows of `target`, `queries`, `count`, `probes`, and `recall`: the share of the exact ten best that are found.
    """
    lists = int(index.manifest.engine["lists"])
    steps = [1 << power for power in range(lists.bit_length()) if 1 << power < lists] + [lists]
    rows = []
    for kind, vectors in queries.items():
        best = [_ids(matches) for matches in index.search(vectors, TOP_K, target, exact=True)]
        for probes in steps:
            approximate = [_ids(matches) for matches in index.search(vectors, TOP_K, target, probes=probes)]
            recall = np.mean([len(one & other) / len(one) for one, other in zip(best, approximate, strict=True)])
            row = {"target": target, "queries": kind, "count": len(vectors), "probes": probes}
            rows.append(row | {"recall": round(float(recall), 4)})
    return rows


def fewest_probes(table: list[dict[str, Any]], target: str, min_recall: float) -> int:
    """The smallest number of probed lists that gives text queries enough recall.

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
