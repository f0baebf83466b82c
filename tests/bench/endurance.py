"""The served application under load for a quarter of an hour, while it is changed and broken.

Two models are registered and an index of each is published. Searches and embeddings are asked for without a pause.
Meanwhile, in turn, the index gets new items (embed.py, then a deployment), the alias moves to the other model (embed.py
with it, the alias, a deployment), and a replica is killed with `kill -9`. The last third of the time nothing is done.

Every answer is checked against what the library alone computes: the model and the version of the index that it names,
and all its scores or numbers. A wrong answer, a failure other than 500, 503 or a lost connection within some seconds of
a kill, or memory that grows ends it with exit code 1.

    python tests/bench/endurance.py [--quick]

With --quick each is done once, which takes two minutes. The last line is JSON. It has no rival: what is measured is
whether anything goes wrong.
"""

import base64
import contextlib
import itertools
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray import serve

from harness import arguments, report
from longclip.checkpoint import checkpoint_id, load_checkpoint, new_model, save_checkpoint
from longclip.index import version_manifests
from pipelines import embed
from pipelines.registry.registration import register_checkpoint
from pipelines.registry.versions import move_alias
from serving.app import AppArgs, build

sys.path.append(str(Path(__file__).resolve().parents[2]))  # before what lies there and is not installed

from tests.support.load import Load
from tests.support.local_serve import local_serve
from tests.support.processes import processes_below
from tests.support.scenes_index import library_image_embedding, library_text_embedding, scene
from tests.support.tiny_clip import tiny_config

NAME, ALIAS = "longclip", "champion"
ITEMS, NEW_ITEMS, REPLICAS, CLIENTS, TOP = 200, 5, 2, 4, 5
QUERIES = [scene(seed)[1] for seed in range(1000, 1016)]
GRACE_SECONDS = 10
"""After a kill, for requests that were sent to the dead before it was missed."""
GROWTH = 1.1
SERVING = ("ServeReplica", "ProxyActor", "ServeController")


class Truth:
    """What the library says that answers must be: of a model, and of every version of the index."""

    def __init__(self, model: Path) -> None:
        self.model, self.checkpoint = model, load_checkpoint(model)
        self.id = checkpoint_id(model)
        self.texts = library_text_embedding(self.checkpoint, *QUERIES)
        self.images = np.zeros((0, self.texts.shape[1]), np.float32)
        self.scores: dict[int, np.ndarray] = {}

    def add_version(self, version: int, items: int) -> None:
        """Note the best scores of each query among the first `items` scenes."""
        new = [scene(seed)[0] for seed in range(len(self.images), items)]
        if new:
            self.images = np.concatenate([self.images, library_image_embedding(self.checkpoint, *new)])
        self.scores[version] = np.sort(self.texts @ self.images[:items].T)[:, : -TOP - 1 : -1]

    def holds(self, query: int, answer: dict[str, Any]) -> bool:
        """Whether this model may have given an answer to a query."""
        if "hits" not in answer:
            embedding = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
            return np.allclose(embedding, self.texts[query], atol=1e-4)
        named = {answer["model"]["checkpoint_id"], answer["index"]["checkpoint_id"]}
        if named != {self.id} or answer["index"]["version"] not in self.scores:
            return False
        scores = [hit["score"] for hit in answer["hits"]]
        return np.allclose(scores, self.scores[answer["index"]["version"]][query], atol=1e-4)


class Questions(Load):
    """Searches and embeddings, and what became of them."""

    def __init__(self, url: str, truths: list[Truth]) -> None:
        super().__init__(url, CLIENTS)
        self.truths = truths
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.failed: list[tuple[float, str]] = []
        self.models = Counter[str]()
        self._draws = [random.Random(number) for number in range(CLIENTS)]

    def ask(self, client: httpx.Client, number: int) -> None:
        """One of the two, with one of the queries."""
        draw = self._draws[number]
        query = draw.randrange(len(QUERIES))
        path, body = "/v1/search", {"query": {"text": QUERIES[query]}, "top_k": TOP}
        if draw.random() < 0.5:
            path, body = "/v1/embeddings", {"input": QUERIES[query], "encoding_format": "base64"}
        start = time.monotonic()
        try:
            response = client.post(path, json=body)
        except httpx.TransportError as error:
            self.failed.append((start, type(error).__name__))
            return
        if response.status_code != 200:
            self.failed.append((start, str(response.status_code)))
            return
        self.seconds.append(time.monotonic() - start)
        givers = [truth.id for truth in self.truths if truth.holds(query, response.json())]
        self.models.update(givers)
        if not givers:
            self.wrong.append(f"{path}, query {query}: {response.text[:300]}")


class Server:
    """The application, its registry and its index, and what is done to them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.index, self.rows = directory, directory / "index", directory / "rows.parquet"
        self.uri = f"sqlite:///{directory}/mlflow.db"
        self.items, self.revisions = ITEMS, itertools.count()
        self.truths: list[Truth] = []
        self.done, self.kills = Counter[str](), list[float]()
        for number in range(2):
            torch.manual_seed(number)
            checkpoint = directory / str(number) / "checkpoint"
            save_checkpoint(new_model(tiny_config()), checkpoint, {"origin": "random"})
            register_checkpoint(self.uri, checkpoint, NAME, "endurance", {}, ALIAS if number == 0 else "next")
            self.truths.append(Truth(checkpoint))
        self.serving = 0
        self.embed(0)
        self.deploy()

    def embed(self, number: int) -> None:
        """Publish all rows as one model sees them."""
        scenes = [scene(seed) for seed in range(self.items)]
        columns: dict[str, Any] = {"id": [f"scene/{seed}" for seed in range(self.items)]}
        columns |= {"image": [image for image, _ in scenes], "caption": [caption for _, caption in scenes]}
        pq.write_table(pa.table(columns), self.rows)
        settings = [f"input={self.rows}", f"model={self.truths[number].model}", f"output={self.index}"]
        with open(self.directory / "embed.log", "a") as log, contextlib.redirect_stdout(log):
            embed.main([part for setting in settings for part in ("--set", setting)])
        self.truths[number].add_version(version_manifests(self.index)[-1].version, self.items)

    def deploy(self) -> None:
        """What `serve deploy` does with another revision."""
        args = AppArgs(
            model=f"models:/{NAME}@{ALIAS}",
            index=str(self.index),
            cache=str(self.directory / "cache"),
            replicas=REPLICAS,
            torch_threads=1,
            revision=str(next(self.revisions)),
        )
        serve.run(build(args), name=NAME, route_prefix="/")

    def refresh(self) -> None:
        """New items in the index of the model that is served."""
        self.items += NEW_ITEMS
        self.embed(self.serving)
        self.deploy()

    def promote(self) -> None:
        """The other model, with an index of its own."""
        self.embed(1 - self.serving)
        before, after = str(self.serving + 1), str(2 - self.serving)
        move_alias(self.uri, NAME, ALIAS, before, after)
        self.serving = 1 - self.serving
        self.deploy()

    def kill(self) -> None:
        """`kill -9` of a replica."""
        pids = [pid for pid, name in processes_below(os.getpid()) if "ServeReplica" in name]
        self.kills.append(time.monotonic())
        os.kill(random.choice(pids), signal.SIGKILL)

    def disturb(self, pause: float) -> None:
        """All three in turn."""
        for action in (self.refresh, self.promote, self.kill):
            action()
            self.done[action.__name__] += 1
            print(f"{action.__name__}: {dict(self.done)}, {self.items} items", flush=True)
            time.sleep(pause)

    def memory(self) -> float:
        """MiB that the processes of the application have for themselves."""
        total = 0
        for pid, name in processes_below(os.getpid()):
            if any(part in name for part in SERVING):
                with contextlib.suppress(OSError):  # it has just ended
                    own = re.findall(r"Private_\w+: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
                    total += sum(map(int, own))
        return total / 1024


def main() -> None:
    """Load, disturb, judge."""
    options = arguments(__doc__)
    minutes, pause = (1.0, 2.0) if options.quick else (15.0, 20.0)
    with tempfile.TemporaryDirectory() as directory, local_serve() as url:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory}/mlflow.db"
        server = Server(Path(directory))
        start = time.monotonic()
        with Questions(url, server.truths) as load:
            server.disturb(pause)
            while time.monotonic() - start < 40 * minutes:
                server.disturb(pause)
            time.sleep(GRACE_SECONDS)
            memory: list[float] = []
            while not memory or time.monotonic() - start < 60 * minutes:
                memory.append(server.memory())
                print(f"{len(load.seconds)} answers, {len(load.failed)} failed, {memory[-1]:.0f} MiB", flush=True)
                time.sleep(2)
    third = max(1, len(memory) // 3)
    first, last = statistics.median(memory[:third]), statistics.median(memory[-third:])
    undocumented = [
        what
        for when, what in load.failed
        if what not in ("500", "503", "ReadError", "RemoteProtocolError")
        or not any(-1 < when - kill < GRACE_SECONDS for kill in server.kills)
    ]
    report(
        "endurance",
        options.quick,
        minutes=round((time.monotonic() - start) / 60, 1),
        answers=len(load.seconds),
        by_model=sorted(load.models.values()),
        wrong=len(load.wrong),
        failed=dict(Counter(what for _, what in load.failed)),
        undocumented=len(undocumented),
        done=dict(server.done),
        milliseconds={
            f"p{level}": round(1000 * float(np.percentile(load.seconds, level)), 1) for level in (50, 95, 99)
        },
        memory_mib=[round(first), round(last)],
    )
    for mistake in (*load.wrong[:5], *undocumented[:5]):
        print(f"error: {mistake}", file=sys.stderr)
    if load.wrong or undocumented or last > GROWTH * first:
        sys.exit(1)


if __name__ == "__main__":
    main()
