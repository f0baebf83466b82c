"""What benchmarks over HTTP share: servers as processes of their own, clients of a closed and of an open loop."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
"""Threads of every server's model."""
PATIENCE = 300
"""Seconds that clients wait for an answer, and that servers keep a connection which a busy loop makes look idle."""
CLIENTS = {1: 10, 4: 24, 16: 64, 64: 128}
"""Requests of a round, by clients."""
WORDS = ("red", "green", "small", "round", "dog", "bird", "house", "tree", "river", "old", "stone", "boats", "bridge")


def texts(count: int, seed: int, short: bool) -> list[str]:
    """Texts of mixed lengths, all different: half of them 8 to 60 tokens, half 100 to 240, or all short."""
    draw = random.Random(seed)
    lengths = [draw.randint(8, 60) if short or row % 2 else draw.randint(100, 240) for row in range(count)]
    return [f"{seed} {row} " + " ".join(draw.choices(WORDS, k=length - 5)) for row, length in enumerate(lengths)]


def free_port() -> int:
    """A port of loopback that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], log: Path, *ready: str, **environment: str) -> Iterator[None]:
    """A server in a process of its own, from when it answers at the addresses `ready` until the block ends."""
    with open(log, "w") as file:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=variables)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                if all(httpx.get(url, timeout=5).status_code == 200 for url in ready):
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: a server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def applications(folder: Path, variants: Mapping[str, Mapping[str, object]]) -> Iterator[dict[str, str]]:
    """Addresses of our application on Ray Serve behind HAProxy, by name; with arguments of `serving.app:build`."""
    http, config = {"host": "127.0.0.1", "port": free_port()}, folder / "serve.yaml"
    entries = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "serving.app:build",
            "args": {"torch_threads": THREADS, **args},
        }
        for name, args in variants.items()
    ]
    config.write_text(yaml.safe_dump({"http_options": http, "applications": entries}))
    urls = {name: f"http://127.0.0.1:{http['port']}/{name}" for name in variants}
    with running(
        [str(Path(sys.executable).with_name("serve")), "run", str(config)],
        folder / "ours.log",
        *(f"{url}/readyz" for url in urls.values()),
        RAY_ADDRESS="local",
        RAY_OVERRIDE_RESOURCES=json.dumps({"CPU": THREADS * len(variants)}),  # they are asked one after the other
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_worker_niceness="0",  # Ray's 15 would let everything else on the machine go first, the rivals too
    ):
        yield urls


async def closed_loop(url: str, requests: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[float]]:
    """Seconds for all requests, of clients that each have one at a time, and those of each answer."""
    queue = iter(requests)
    seconds: list[float] = []

    async def ask(client: httpx.AsyncClient) -> None:
        for request in queue:
            seconds.append(await _seconds(client, url, request))

    async with _client() as client:
        start = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        return time.perf_counter() - start, seconds


async def open_loop(url: str, requests: Sequence[dict[str, Any]], rate: float) -> list[float]:
    """Seconds of each answer when so many requests a second arrive, whatever became of the others."""
    pause = random.Random(0)
    async with _client() as client:
        tasks = []
        for request in requests:
            tasks.append(asyncio.create_task(_seconds(client, url, request)))
            await asyncio.sleep(pause.expovariate(rate))
        return list(await asyncio.gather(*tasks))


async def _seconds(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> float:
    start = time.perf_counter()
    (await client.post(url, json=request)).raise_for_status()
    return time.perf_counter() - start


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=PATIENCE, limits=limits)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds."""
    return {f"p{level}": round(1000 * float(np.percentile(seconds, level)), 1) for level in (50, 95, 99)}
