"""Embedding texts over HTTP: throughput and latency of our server against others, same weights, same requests.

Servers, each a process of its own with two threads for the model:

    ours            the application on Ray Serve behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1)
    ours_bfloat16   the same with precision=bfloat16, where the CPU has instructions for that
    no_proxy        ours under uvicorn alone: what Serve costs
    plain           the rival that anybody would write: FastAPI and transformers, requests as they come, padded to 248
    infinity        the rival infinity-emb, with --infinity PROGRAM; it reads 77 tokens, so all texts then are short

Closed loop: so many clients, each with one text a request and the next one when it is answered. Texts have mixed
lengths, half of them 8 to 60 tokens, half 100 to 240; none comes twice. Vectors are compared first, else exit code 1.

    python tests/bench/bench_serving.py [--quick] [--infinity /venv/bin/infinity_emb]

The last line is JSON; `ratio` is ours over plain in answers per second at 16 clients. `remembered_ms` is that of a text
that was asked before, and so what HTTP costs; `refused_ms` that of an answer 429 of an overloaded server, null
with --quick.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import CLIPConfig

from harness import arguments, report
from longclip.checkpoint import load_checkpoint, new_model, save_checkpoint
from longclip.encode import encode_text, unit
from longclip.tokenizer import tokenize
from servers import (
    PATIENCE,
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

FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")
IDLE = 0.5
"""Seconds in which a server without other work answers."""


@contextmanager
def servers(model: Path, logs: Path, infinity: str | None) -> Iterator[dict[str, str]]:
    """Addresses of `POST .../embeddings`, by rival."""
    with ExitStack() as stack:
        variants: dict[str, dict[str, object]] = {"ours": {"model": str(model)}}
        if any(torch.cpu.get_capabilities().get(name) for name in FAST_BFLOAT16):
            variants["ours_bfloat16"] = {"model": str(model), "precision": "bfloat16"}
        started = stack.enter_context(applications(logs, variants))
        urls = {name: f"{url}/v1/embeddings" for name, url in started.items()}
        for name in ("no_proxy", "plain"):
            url, log = f"http://127.0.0.1:{(port := free_port())}", logs / f"{name}.log"
            command = [sys.executable, __file__, "--model", str(model), "--port", str(port), "--run", name]
            stack.enter_context(running(command, log, f"{url}/healthz"))
            urls[name] = f"{url}/v1/embeddings"
        if infinity:
            url, log = f"http://127.0.0.1:{(port := free_port())}", logs / "infinity.log"
            command = [infinity, "v2", "--model-id", str(model), "--port", str(port)]
            command += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
            stack.enter_context(running(command, log, f"{url}/health", OMP_NUM_THREADS=str(THREADS)))
            urls["infinity"] = f"{url}/embeddings"
        yield urls


def serve_alone(model: Path, port: int) -> None:
    """Our API under uvicorn."""
    from serving.api import create_api
    from serving.embedder import Embedder
    from serving.model_source import open_model
    from serving.operations import Operations

    found, checkpoint = open_model(str(model), ""), load_checkpoint(model)
    operations = Operations(found, checkpoint, Embedder(checkpoint, THREADS))
    run_api(create_api(operations), port)


def serve_plain(model: Path, port: int) -> None:
    """A server without any care for lengths."""
    api, embed = plain_api(model)

    @api.post("/v1/embeddings")
    def embeddings(request: dict[str, Any]) -> dict[str, Any]:
        vectors = embed(request["input"]).astype("<f4")
        encoded = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        return {"data": [{"index": row, "embedding": vector} for row, vector in enumerate(encoded)]}

    run_api(api, port)


def request(model: Path, text: str) -> dict[str, Any]:
    """What asks for the embedding of a text."""
    return {"input": [text], "encoding_format": "base64", "model": model.name}


def vectors(url: str, model: Path, inputs: list[str]) -> np.ndarray:
    """Embeddings of some texts by a server."""
    request = {"input": inputs, "encoding_format": "base64", "model": model.name}
    data = httpx.post(url, json=request, timeout=PATIENCE).raise_for_status().json()["data"]
    return np.stack([np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data])


async def refusals(url: str, model: Path, short: bool) -> list[float]:
    """Seconds of answers 429 to requests that come one by one while far too many others wait."""
    seconds: list[float] = []
    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(number: int) -> httpx.Response:
            return await client.post(url, json={"input": texts(16, number, short), "model": model.name})

        flood = [asyncio.create_task(ask(10_000 + number)) for number in range(256)]
        await asyncio.sleep(3)  # all of them are in
        for number in range(20):
            start = time.perf_counter()
            if (await ask(20_000 + number)).status_code == 429:
                seconds.append(time.perf_counter() - start)
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    # What comes next finds the server idle again: HAProxy does not tell it that all of these clients left.
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        for number in itertools.count():
            start = time.perf_counter()
            answer = await client.post(url, json={"input": f"still busy? {number}", "model": model.name})
            if answer.status_code == 200 and time.perf_counter() - start < IDLE:
                break
            await asyncio.sleep(1)
    return seconds


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
    short = bool(options.infinity)
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
            rivals = {name: (url, partial(request, model)) for name, url in urls.items()}
            per_second, answers = ask_in_rounds(rivals, short, options.quick)
            asyncio.run(closed_loop(urls["ours"], [request(model, "again")] * 20, 1))
            _, remembered = asyncio.run(closed_loop(urls["ours"], [request(model, "again")] * 300, 1))
            refused = [] if options.quick else asyncio.run(refusals(urls["ours"], model, short))
            opened = {}
            for share in () if options.quick else (0.5, 0.8, 1.0):
                rate = share * max(value for (name, _), value in per_second.items() if name == "ours")
                inputs = [request(model, text) for text in texts(80, round(100 * share), short)]
                opened[f"{share:.0%}"] = quantiles(asyncio.run(open_loop(urls["ours"], inputs, rate)))
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
