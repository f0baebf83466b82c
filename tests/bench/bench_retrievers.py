"""What it costs to share the shards of an index out among retrievers: searches over HTTP, one at a time.

    local       the rival: the replica holds all shards and compares in its own process
    retrievers  the replica asks as many retrievers as the shards need, and merges

The items are few, so that what is measured is the asking. Queries are vectors. Hits of both are compared first, else
exit code 1.

    python tests/bench/bench_retrievers.py [--quick]

The last line is JSON: medians in milliseconds by number of shards, `ms_a_shard` is what one more shard adds, and
`ratio` the time of local over that with retrievers, at the most shards.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import ray
from ray import serve

from harness import alternating, arguments, report
from longclip.checkpoint import checkpoint_id, new_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # before what lies there and is not installed

from serving.app import AppArgs, build  # noqa: E402
from tests.support.s3_server import free_ports  # noqa: E402
from tests.support.scenes_index import write_version  # noqa: E402
from tests.support.tiny_clip import tiny_config  # noqa: E402

ITEMS_A_SHARD, SHARDS_A_RETRIEVER, TOP_K = 100, 8, 10


def unit_vectors(count: int, dim: int) -> np.ndarray:
    """Random directions `[count, dim]`."""
    vectors = np.random.default_rng(0).normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def search(client: httpx.Client, path: str, queries: np.ndarray) -> list[list[tuple[str, float]]]:
    """Hits of each query."""
    found = []
    for query in queries:
        answer = client.post(f"{path}/v1/search", json={"query": {"embedding": query.tolist()}, "top_k": TOP_K})
        found.append([(hit["id"], round(hit["score"], 4)) for hit in answer.raise_for_status().json()["hits"]])
    return found


def main() -> None:
    """Measure, compare, report."""
    options = arguments(__doc__)
    counts, queries, rounds = ((1, 8), 20, 2) if options.quick else ((1, 8, 32), 100, 5)
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(new_model(tiny_config()), folder / "model", {"origin": "benchmark"})
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        milliseconds: dict[str, dict[int, float]] = {"local": {}, "retrievers": {}}
        for shards in counts:
            vectors = unit_vectors(shards * ITEMS_A_SHARD + queries, tiny_config().projection_dim)
            rows = shards * ITEMS_A_SHARD
            text = [""] * rows
            items = pa.table({"id": [str(row) for row in range(rows)], "caption": text, "thumbnail": [b""] * rows})
            index = folder / f"index-{shards}"
            write_version(
                index,
                1,
                items,
                {"image": vectors[:rows]},
                shards=shards,
                checkpoint_id=checkpoint_id(folder / "model"),
            )
            retrievers = -(-shards // SHARDS_A_RETRIEVER)
            for path, count in (("/local", 0), ("/retrievers", retrievers)):
                args = AppArgs(model=str(folder / "model"), index=str(index), retrievers=count, torch_threads=1)
                serve.run(build(args), name=path.strip("/"), route_prefix=path)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                asked = {kind: partial(search, client, f"/{kind}", vectors[rows:]) for kind in milliseconds}
                if asked["local"]() != asked["retrievers"]():
                    sys.exit(f"error: with {shards} shards, retrievers find other items than a replica that holds all")
                for kind, seconds in alternating(asked, rounds).items():
                    milliseconds[kind][shards] = round(1000 * seconds / queries, 2)
                    print(f"{shards} shards, {kind}: {milliseconds[kind][shards]} ms", flush=True)
        serve.shutdown()
        ray.shutdown()
    few, many = min(counts), max(counts)
    report(
        "retrievers",
        options.quick,
        ratio=round(milliseconds["local"][many] / milliseconds["retrievers"][many], 2),
        ms_a_shard=round((milliseconds["retrievers"][many] - milliseconds["retrievers"][few]) / (many - few), 2),
        p50_ms=milliseconds,
    )


if __name__ == "__main__":
    main()
