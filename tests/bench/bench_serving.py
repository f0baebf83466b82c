"""Embedding texts over HTTP: throughput and latency of our server against others, same weights, same requests.

Servers, each a process of its own with two threads for the model:

    ours        the application on Ray Serve behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1)
    no_proxy    the same API under uvicorn alone: what Serve costs
    plain       the rival that anybody would write: FastAPI and transformers, requests as they come, padded to 248
    infinity    the rival infinity-emb, with --infinity PROGRAM; it reads 77 tokens, so all texts then are short

Closed loop: so many clients, each with one text a request and the next one when it is answered. Texts have mixed
lengths, half of them 8 to 60 tokens, half 100 to 240; none comes twice. Vectors are compared first, else exit code 1.

    python tests/bench/bench_serving.py [--quick] [--infinity /venv/bin/infinity_emb]

The last line is JSON; `ratio` is ours over plain in answers per second at 16 clients. `remembered_ms` is that of a text
that was asked before, and so what HTTP costs; `refused_ms` that of an answer 429 of an overloaded server.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from transformers import CLIPConfig

from harness import arguments, report
from longclip.checkpoint import load_checkpoint, new_model, save_checkpoint
from longclip.encode import encode_text, unit
from longclip.tokenizer import tokenize

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
CLIENTS = {1: 10, 4: 24, 16: 64, 64: 128}
"""Requests of a round, by clients."""
PATIENCE = 300
"""Seconds that clients wait for an answer, and that servers keep a connection which a busy loop makes look idle."""
WORDS = ("red", "green", "small", "round", "dog", "bird", "house", "tree", "river", "old", "stone", "boats", "bridge")


def texts(count: int, seed: int, short: bool) -> list[str]:
    """Texts of mixed lengths, all different."""
    draw = random.Random(seed)
    lengths = [draw.randint(8, 60) if short or row % 2 else draw.randint(100, 240) for row in range(count)]
    return [f"{seed} {row} " + " ".join(draw.choices(WORDS, k=length - 5)) for row, length in enumerate(lengths)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], log: Path, ready: str, **environment: str) -> Iterator[None]:
    """A server in a process of its own, from when it answers until the block ends."""
    with open(log, "w") as file:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=variables)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                if httpx.get(ready, timeout=5).status_code == 200:
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
def servers(model: Path, logs: Path, infinity: str | None) -> Iterator[dict[str, str]]:
    """Addresses of `POST .../embeddings`, by rival."""
    ports = {name: free_port() for name in ("ours", "no_proxy", "plain", "infinity")}
    application = {"name": "longclip", "import_path": "serving.app:build"}
    application["args"] = {"model": str(model), "torch_threads": THREADS}  # type: ignore[assignment]
    config = logs / "serve.yaml"
    http = {"host": "127.0.0.1", "port": ports["ours"]}
    config.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
    serve = str(Path(sys.executable).with_name("serve"))
    here = [sys.executable, __file__, "--model", str(model), "--port"]
    with ExitStack() as stack:
        stack.enter_context(
            running(
                [serve, "run", str(config)],
                logs / "ours.log",
                f"http://127.0.0.1:{ports['ours']}/readyz",
                RAY_ADDRESS="local",
                RAY_SERVE_ENABLE_HA_PROXY="1",
                RAY_worker_niceness="0",  # Ray's 15 would let everything else on the machine go first, the rivals too
            )
        )
        urls = {"ours": f"http://127.0.0.1:{ports['ours']}/v1/embeddings"}
        for name in ("no_proxy", "plain"):
            command = [*here, str(ports[name]), "--run", name]
            stack.enter_context(running(command, logs / f"{name}.log", f"http://127.0.0.1:{ports[name]}/healthz"))
            urls[name] = f"http://127.0.0.1:{ports[name]}/v1/embeddings"
        if infinity:
            command = [infinity, "v2", "--model-id", str(model), "--port", str(ports["infinity"])]
            command += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
            ready = f"http://127.0.0.1:{ports['infinity']}/health"
            stack.enter_context(running(command, logs / "infinity.log", ready, OMP_NUM_THREADS=str(THREADS)))
            urls["infinity"] = f"http://127.0.0.1:{ports['infinity']}/embeddings"
        yield urls


def serve_alone(model: Path, port: int) -> None:
    """Our API under uvicorn."""
    import uvicorn

    from serving.api import create_api
    from serving.artifacts import open_model
    from serving.embedder import Embedder
    from serving.service import Service

    found, checkpoint = open_model(str(model), ""), load_checkpoint(model)
    service = Service(found, checkpoint, Embedder(checkpoint, THREADS))
    uvicorn.run(create_api(service), host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=PATIENCE)


def serve_plain(model: Path, port: int) -> None:
    """A server without any care for lengths."""
    import uvicorn
    from fastapi import FastAPI
    from transformers import CLIPModel, CLIPTokenizer

    torch.set_num_threads(THREADS)
    clip, tokenizer = CLIPModel.from_pretrained(model).eval(), CLIPTokenizer.from_pretrained(model)
    api = FastAPI()

    @api.get("/healthz")
    def healthz() -> str:
        return "ok"

    @api.post("/v1/embeddings")
    def embeddings(request: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenizer(request["input"], padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            features = clip.get_text_features(**tokens).pooler_output
        vectors = (features / features.norm(dim=-1, keepdim=True)).numpy().astype("<f4")
        encoded = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        return {"data": [{"index": row, "embedding": vector} for row, vector in enumerate(encoded)]}

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=PATIENCE)


def vectors(url: str, model: Path, inputs: list[str]) -> np.ndarray:
    """Embeddings of some texts by a server."""
    request = {"input": inputs, "encoding_format": "base64", "model": model.name}
    data = httpx.post(url, json=request, timeout=PATIENCE).raise_for_status().json()["data"]
    return np.stack([np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data])


async def closed_loop(url: str, model: Path, inputs: list[str], clients: int) -> tuple[float, list[float]]:
    """Seconds for all texts, and those of each answer."""
    queue = iter(inputs)
    seconds: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def ask(client: httpx.AsyncClient) -> None:
        for text in queue:
            start = time.perf_counter()
            request = {"input": [text], "encoding_format": "base64", "model": model.name}
            (await client.post(url, json=request)).raise_for_status()
            seconds.append(time.perf_counter() - start)

    async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
        start = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        return time.perf_counter() - start, seconds


async def open_loop(url: str, model: Path, inputs: list[str], rate: float) -> list[float]:
    """Seconds of each answer when so many requests a second arrive, whatever became of the others."""
    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(text: str) -> float:
            start = time.perf_counter()
            request = {"input": [text], "encoding_format": "base64", "model": model.name}
            (await client.post(url, json=request)).raise_for_status()
            return time.perf_counter() - start

        tasks = []
        for text in inputs:
            tasks.append(asyncio.create_task(ask(text)))
            await asyncio.sleep(random.Random(len(tasks)).expovariate(rate))
        return list(await asyncio.gather(*tasks))


async def refusals(url: str, model: Path, short: bool) -> list[float]:
    """Seconds of answers 429 to requests that come one by one while far too many others wait."""
    inputs = texts(16, 9, short)
    seconds: list[float] = []
    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:

        async def ask() -> httpx.Response:
            return await client.post(url, json={"input": inputs, "model": model.name})

        flood = [asyncio.create_task(ask()) for _ in range(256)]
        await asyncio.sleep(3)  # all of them are in
        for _ in range(20):
            start = time.perf_counter()
            if (await ask()).status_code == 429:
                seconds.append(time.perf_counter() - start)
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    async with httpx.AsyncClient(timeout=PATIENCE) as client:  # what comes next finds the server idle again
        while (await client.post(url, json={"input": "still busy?", "model": model.name})).status_code == 429:
            await asyncio.sleep(1)
    return seconds


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds."""
    return {f"p{level}": round(1000 * float(np.percentile(seconds, level)), 1) for level in (50, 95, 99)}


def main() -> None:
    """Measure, compare, report."""
    if "--run" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--run", choices=("no_proxy", "plain"))
        parser.add_argument("--model", type=Path)
        parser.add_argument("--port", type=int)
        run = parser.parse_args()
        (serve_alone if run.run == "no_proxy" else serve_plain)(run.model, run.port)
        return
    options = arguments(__doc__, infinity={"help": "program of a rival server, infinity_emb"})
    loads = {16: 64} if options.quick else CLIENTS
    rounds, short = 1 if options.quick else 3, bool(options.infinity)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "clip"
        size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
        text = {"eos_token_id": 49407, "max_position_embeddings": 77 if short else 248}
        text |= size if options.quick else {}
        torch.manual_seed(0)
        save_checkpoint(new_model(CLIPConfig(text_config=text)), model, {"origin": "random"})
        if options.infinity:
            # It cuts texts to `max_length` of the configuration, which older transformers make 20 where no file says.
            written = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(written | {"max_length": text["max_position_embeddings"]}))
        with servers(model, Path(directory), options.infinity) as urls:
            compare(urls, model, short)
            answers: dict[tuple[str, int], list[float]] = {}
            rates: dict[tuple[str, int], list[float]] = {}
            for number in range(rounds):
                for clients, count in loads.items():
                    for name, url in urls.items():
                        inputs = texts(count, 1000 * number + clients, short)
                        taken, seconds = asyncio.run(closed_loop(url, model, inputs, clients))
                        rates.setdefault((name, clients), []).append(count / taken)
                        answers.setdefault((name, clients), []).extend(seconds)
                        found = f"{name}, {clients} clients: {count / taken:.1f}/s"
                        print(f"round {number + 1}/{rounds}: {found}", flush=True)
            per_second = {key: statistics.median(values) for key, values in rates.items()}
            asyncio.run(closed_loop(urls["ours"], model, ["again"] * 20, 1))
            _, remembered = asyncio.run(closed_loop(urls["ours"], model, ["again"] * 300, 1))
            refused = asyncio.run(refusals(urls["ours"], model, short))
            opened = {}
            for share in () if options.quick else (0.5, 0.8, 1.0):
                rate = share * max(value for (name, _), value in per_second.items() if name == "ours")
                inputs = texts(80, round(100 * share), short)
                opened[f"{share:.0%}"] = quantiles(asyncio.run(open_loop(urls["ours"], model, inputs, rate)))
    report(
        "serving",
        options.quick,
        ratio=round(per_second["ours", 16] / per_second["plain", 16], 2),
        per_second={f"{name}, {clients}": round(value, 1) for (name, clients), value in per_second.items()},
        milliseconds={f"{name}, {clients}": quantiles(values) for (name, clients), values in answers.items()},
        open_loop=opened,
        remembered_ms=quantiles(remembered),
        refused_ms=quantiles(refused) if refused else None,
        cores=os.cpu_count(),
    )


def compare(urls: dict[str, str], model: Path, short: bool) -> None:
    """Exit where a server's vectors are not those of the library."""
    inputs = texts(8, 5, short)
    checkpoint = load_checkpoint(model)
    with torch.inference_mode():
        expected = unit(encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, inputs))).numpy()
    for name, url in urls.items():
        cosine = (vectors(url, model, inputs) * expected).sum(1).min()
        if cosine < 0.9999:
            sys.exit(f"error: vectors of {name} have a cosine of {cosine:.5f} to ours")


if __name__ == "__main__":
    main()
