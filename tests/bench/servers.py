"""What benchmarks over HTTP share: servers as processes of their own, clients of a closed and of an open loop."""

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
import yaml
from fastapi import FastAPI
from transformers import CLIPModel, CLIPTokenizer

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


def ask_in_rounds(
    rivals: Mapping[str, tuple[str, Callable[[str], dict[str, Any]]]], short: bool, quick: bool
) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], list[float]]]:
    """Closed loops of all rivals, one after the other, in rounds.

    Args:
        rivals: address, and the request that asks about a text, by name.
        short: only short texts.
        quick: one round, of 16 clients.

    Returns:
        By name and number of clients: answers per second (median of the rounds), and seconds of each answer.
    """
    loads, rounds = ({16: 64}, 1) if quick else (CLIENTS, 3)
    rates: dict[tuple[str, int], list[float]] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for clients, count in loads.items():
            for name, (url, request) in rivals.items():
                asked = [request(text) for text in texts(count, 1000 * number + clients, short)]
                taken, each = asyncio.run(closed_loop(url, asked, clients))
                rates.setdefault((name, clients), []).append(count / taken)
                seconds.setdefault((name, clients), []).extend(each)
                print(f"round {number + 1}/{rounds}: {name}, {clients} clients: {count / taken:.1f}/s", flush=True)
    return {key: statistics.median(values) for key, values in rates.items()}, seconds


def plain_api(model: Path) -> tuple[FastAPI, Callable[[str | list[str]], np.ndarray]]:
    """An API that says it is healthy, and how anybody would embed texts `[N, E]` with transformers: padded."""
    torch.set_num_threads(THREADS)
    clip, tokenizer = CLIPModel.from_pretrained(model).eval(), CLIPTokenizer.from_pretrained(model)
    api = FastAPI()

    @api.get("/healthz")
    def healthz() -> str:
        return "ok"

    def embed(inputs: str | list[str]) -> np.ndarray:
        tokens = tokenizer(inputs, padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            features = clip.get_text_features(**tokens).pooler_output
        return (features / features.norm(dim=-1, keepdim=True)).numpy()

    return api, embed


def run_api(api: FastAPI, port: int) -> None:
    """Serve an API with uvicorn until this process is ended."""
    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=PATIENCE)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds."""
    return {f"p{level}": round(1000 * float(np.percentile(seconds, level)), 1) for level in (50, 95, 99)}
