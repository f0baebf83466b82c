"""Searching images by text over HTTP: throughput and latency at equal recall, same weights, same vectors, same queries.

Servers, each a process of its own with two threads for the model:

    ours            the application on Ray Serve behind HAProxy, and an index with a structure as `embed` publishes it
    plain           the rival that anybody would write: FastAPI, transformers, requests as they come, FAISS HNSW
    clip_retrieval  the rival clip-retrieval: the index that it makes, and its back end, with --clip-retrieval PYTHON,
                    of an environment as `clip_retrieval_back.py` says

Vectors are those of bench_index. Every server searches as little as finds 0.95 of the truly ten best for one half of
the queries; `recall` is what it finds over HTTP for the other half. Eight texts have their own vectors in the index: a
server that does not find each of them first, with a score of 1, embeds otherwise than the library, and the exit code
is 1.

Closed loop: so many clients, each with one text a request, of 8 to 60 tokens, none twice. Open loop: requests arrive at
a share of the rate that the slowest server answers with 16 clients.

    python tests/bench/bench_search.py [--quick] [--rows 200000] [--clip-retrieval /venv/bin/python]

The last line is JSON; `ratio` is ours over clip-retrieval, or where it is not asked for over plain, in answers per
second at 16 clients.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CLIPConfig

from bench_index import BREADTHS, QUERIES, RECALL, TOP_K, draw, recall
from harness import arguments, report
from longclip.checkpoint import checkpoint_id, load_checkpoint, new_model, save_checkpoint
from longclip.index import PublishedIndex
from longclip.index.gate import fewest_probes, measure_probes
from servers import (
    PATIENCE,
    ROOT,
    THREADS,
    applications,
    ask_in_rounds,
    closed_loop,
    free_port,
    open_loop,
    plain_api,
    quantiles,
    run_api,
    running,
    texts,
)

sys.path.append(str(ROOT))  # before what lies there and is not installed

from tests.support.scenes_index import change_manifest, library_text_embedding, write_version

PLANTED = 8


@dataclass(frozen=True)
class Rival:
    """How a server is asked, and how its answer is read."""

    url: str
    by_text: Callable[[str], dict[str, Any]]
    by_vector: Callable[[list[float]], dict[str, Any]]
    hits: Callable[[Any], list[tuple[int, float]]]
    """Rows and scores of an answer."""

    def ask(self, request: dict[str, Any]) -> list[tuple[int, float]]:
        """Rows and scores for a request."""
        return self.hits(httpx.post(self.url, json=request, timeout=PATIENCE).raise_for_status().json())


def main() -> None:
    """Measure, compare, report."""
    if "--run-plain" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--run-plain", type=Path)
        parser.add_argument("--model", type=Path)
        parser.add_argument("--port", type=int)
        run = parser.parse_args()
        serve_plain(run.run_plain, run.model, run.port)
        return
    options = arguments(
        __doc__,
        rows={"type": int, "default": 200_000, "help": "vectors of the index; 10,000 with --quick"},
        clip_retrieval={"help": "Python of an environment with the rival clip-retrieval"},
    )
    rows, queries = (10_000, 100) if options.quick else (options.rows, QUERIES)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model, planted = folder / "clip", texts(PLANTED, 5, short=True)
        images, off_images = draw(rows, queries)
        images[:PLANTED] = write_model(model, options.quick, planted)
        best = list(faiss.knn(off_images, images, TOP_K, faiss.METRIC_INNER_PRODUCT)[1])
        tuning, measured = slice(0, queries // 2), slice(queries // 2, None)
        with rivals(folder, model, images, (off_images[tuning], best[tuning]), options.clip_retrieval) as servers:
            found = {}
            for name, server in servers.items():
                check(name, server, planted)
                answers = [server.ask(server.by_vector(query.tolist())) for query in off_images[measured]]
                rows_found = [np.array([row for row, _ in hits]) for hits in answers]
                found[name] = round(recall(rows_found, best[measured]), 3)
            asked_by_text = {name: (server.url, server.by_text) for name, server in servers.items()}
            per_second, seconds = ask_in_rounds(asked_by_text, True, options.quick)
            opened, alone = {}, {}
            for name, server in servers.items():
                vectors = [server.by_vector(query.tolist()) for query in off_images]
                alone[name] = quantiles(asyncio.run(closed_loop(server.url, vectors, 1))[1])
                for share in () if options.quick else (0.5, 0.8):
                    rate = share * min(value for (_, clients), value in per_second.items() if clients == 16)
                    asked = [server.by_text(text) for text in texts(160, round(100 * share), short=True)]
                    opened[f"{name}, {rate:.1f}/s"] = quantiles(asyncio.run(open_loop(server.url, asked, rate)))
    last = list(servers)[-1]
    report(
        "search",
        options.quick,
        ratio=round(per_second["ours", 16] / per_second[last, 16], 2),
        rows=rows,
        recall=found,
        per_second={f"{name}, {clients}": round(value, 1) for (name, clients), value in per_second.items()},
        milliseconds={f"{name}, {clients}": quantiles(values) for (name, clients), values in seconds.items()},
        open_loop=opened,
        by_vector=alone,
        cores=os.cpu_count(),
    )


def write_model(directory: Path, quick: bool, planted: list[str]) -> np.ndarray:
    """Write an untrained CLIP that reads 77 tokens; gives its vectors of some texts."""
    text = {"eos_token_id": 49407, "max_position_embeddings": 77}
    text |= (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
        if quick
        else {}
    )
    torch.manual_seed(0)
    save_checkpoint(new_model(CLIPConfig(text_config=text)), directory, {"origin": "random"})
    return library_text_embedding(load_checkpoint(directory), *planted)


@contextmanager
def rivals(
    folder: Path,
    model: Path,
    images: np.ndarray,
    tuning: tuple[np.ndarray, list[np.ndarray]],
    clip_retrieval: str | None,
) -> Iterator[dict[str, Rival]]:
    """Servers that search the images, tuned to queries and their truly ten best."""
    captions = [f"image {row}" for row in range(len(images))]
    with ExitStack() as stack:
        index = publish(folder / "index", model, images, captions, tuning[0])
        args = {"model": str(model), "index": str(index)}
        ours = stack.enter_context(applications(folder, {"ours": args}))["ours"]
        servers = {
            "ours": Rival(
                f"{ours}/v1/search",
                lambda text: {"query": {"text": text}, "top_k": TOP_K},
                lambda vector: {"query": {"embedding": vector}, "top_k": TOP_K},
                lambda answer: [(int(hit["id"]), hit["score"]) for hit in answer["hits"]],
            )
        }
        hnsw = faiss.IndexHNSWFlat(images.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        hnsw.hnsw.efConstruction = 128
        hnsw.add(images)
        write_tuned(hnsw, folder / "plain.index", *tuning)
        plain = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, __file__, "--run-plain", str(folder / "plain.index")]
        command += ["--model", str(model), "--port", str(port)]
        stack.enter_context(running(command, folder / "plain.log", f"{plain}/healthz"))
        servers["plain"] = Rival(
            f"{plain}/search",
            lambda text: {"text": text},
            lambda vector: {"vector": vector},
            lambda answer: list(zip(answer["rows"], answer["scores"], strict=True)),
        )
        if clip_retrieval:
            made = folder / "clip-retrieval"
            script = [clip_retrieval, str(Path(__file__).with_name("clip_retrieval_back.py"))]
            for part in ("img_emb", "metadata"):
                (made / "embeddings" / part).mkdir(parents=True)
            np.save(made / "embeddings" / "img_emb" / "img_emb_0.npy", images)
            pq.write_table(pa.table({"caption": captions}), made / "embeddings" / "metadata" / "metadata_0.parquet")
            command = [*script, "index", str(made / "embeddings"), str(made / "index")]
            with open(folder / "clip-retrieval-index.log", "w") as file:
                subprocess.run(command, check=True, cwd=made, stdout=file, stderr=file)
            write_tuned(faiss.read_index(str(made / "index" / "image.index")), made / "index" / "image.index", *tuning)
            back = f"http://127.0.0.1:{(port := free_port())}"
            command = [*script, "back", str(made / "index"), str(model), str(port)]
            log = folder / "clip-retrieval.log"
            stack.enter_context(running(command, log, f"{back}/indices-list", OMP_NUM_THREADS=str(THREADS)))
            asked = {"modality": "image", "indice_name": "images", "num_images": TOP_K}
            servers["clip_retrieval"] = Rival(
                f"{back}/knn-service",
                lambda text: {"text": text, **asked},
                lambda vector: {"embedding_input": vector, **asked},
                lambda answer: [(hit["id"], hit["similarity"]) for hit in answer],
            )
        yield servers


def publish(index: Path, model: Path, images: np.ndarray, captions: list[str], queries: np.ndarray) -> Path:
    """An index with a structure, which looks into as many lists as the gate finds to be enough."""
    rows, lists = len(images), int(4 * len(images) ** 0.5)
    items = pa.table({"id": [str(row) for row in range(rows)], "caption": captions, "thumbnail": [b""] * rows})
    version = write_version(
        index, 1, items, {"image": images}, lists, checkpoint_id=checkpoint_id(model), context_length=77
    )
    table = measure_probes(PublishedIndex.open(version), "image", {"text": queries})
    probes = fewest_probes(table, "image", RECALL)
    print(f"ours looks into {probes} of {lists} lists", flush=True)
    change_manifest(version, engine={"name": "ivf", "lists": lists, "probes": {"image": probes}})
    return index


def write_tuned(structure: Any, path: Path, queries: np.ndarray, best: list[np.ndarray]) -> None:
    """Write a structure of FAISS, with the least breadth, or lists, with which it finds enough."""
    for breadth in (8, 16, *BREADTHS):
        for parameter in ("efSearch", "nprobe"):
            with suppress(RuntimeError):  # it has no such parameter
                faiss.ParameterSpace().set_index_parameter(structure, parameter, breadth)
        found = recall(list(structure.search(queries, TOP_K)[1]), best)
        if found >= RECALL:
            break
    print(
        f"{path}: {type(faiss.downcast_index(structure)).__name__}, breadth {breadth}, recall {found:.3f}", flush=True
    )
    faiss.write_index(structure, str(path))


def serve_plain(index: Path, model: Path, port: int) -> None:
    """A server without any care for lengths or batches."""
    structure = faiss.read_index(str(index))
    api, embed = plain_api(model)

    @api.post("/search")
    def search(request: dict[str, Any]) -> dict[str, Any]:
        vector = np.array([request["vector"]], np.float32) if "vector" in request else embed(request["text"])
        scores, rows = structure.search(vector, TOP_K)
        return {"rows": rows[0].tolist(), "scores": scores[0].tolist()}

    run_api(api, port)


def check(name: str, server: Rival, planted: list[str]) -> None:
    """Exit where a server does not find a text's own vector first."""
    for row, text in enumerate(planted):
        first, score = server.ask(server.by_text(text))[0]
        if first != row or abs(score - 1) > 1e-3:
            sys.exit(f"error: {name} finds row {first} with {score:.4f} for the text whose vector is row {row}")


if __name__ == "__main__":
    main()
