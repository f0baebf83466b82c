"""Requests in flight of `caption.py`, against a stand-in for a server that answers after half a second.

The rival is what people write first: a pool of threads that posts images from memory, without reading a data set,
checks, retries or a journal. Both must get a caption for every image, or the benchmark ends with exit code 1.

    python tests/bench/bench_captions.py [--quick] [--rows 2000] [--concurrency 16] [--seconds 0.5] [--workers 1]

The server runs in a process of its own, and counts how many requests it holds, from the first one until fewer are left
to come than may be in flight. The last line is JSON; `ratio` is the average that caption.py holds over the rival's,
`in_flight` both as a share of the stated number, and `full` the share of the time with at least 95 % of that number.
The goal of `in_flight` is 0.95.
"""

import base64
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))
from harness import arguments, report
from pipelines import caption
from tests.support.broken_rows import encoded, photograph
from tests.support.caption_server import CaptionServer, Flight
from tests.support.chat_server import running

SIZE = (640, 480)


def serve(seconds: float, rows: int, concurrency: int, pipe: Any) -> None:
    """Serve until the other end asks for the measurement."""
    with running(CaptionServer(seconds=seconds)) as server:
        flight = Flight(server, rows, concurrency)
        pipe.send(server.url)
        pipe.recv()
        pipe.send(flight.samples)


def measured(seconds: float, rows: int, requests: int, run: Callable[[str], int]) -> tuple[float, float]:
    """Average share of `requests` that `run` holds at a new server, and the share of the time with 95 % of them."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(
        target=serve, args=(seconds, rows, requests, there), daemon=True
    ).start()
    captions = run(here.recv())
    if captions != rows:
        sys.exit(f"error: {captions} captions for {rows} images")
    here.send("stop")
    samples = here.recv()
    return sum(samples) / len(samples) / requests, sum(held >= 0.95 * requests for held in samples) / len(samples)


def main() -> None:
    """Run both, and report."""
    options = arguments(
        __doc__,
        rows={"type": int},
        concurrency={"type": int, "default": 16},
        seconds={"type": float, "default": 0.5},
        workers={"type": int, "default": 1},
    )
    rows = options.rows or (300 if options.quick else 2000)
    requests = options.concurrency * options.workers
    images = [encoded(photograph(number, SIZE), quality=90) for number in range(rows)]

    def threads(url: str) -> int:
        def describe(image: bytes) -> str:
            part = {"url": f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"}
            content = [{"type": "image_url", "image_url": part}, {"type": "text", "text": "Describe the image."}]
            body = {"model": "x", "messages": [{"role": "user", "content": content}]}
            reply = client.post(f"{url}/chat/completions", json=body)
            return reply.json()["choices"][0]["message"]["content"]

        limits = httpx.Limits(max_connections=requests)
        with httpx.Client(timeout=60, limits=limits) as client, ThreadPoolExecutor(requests) as pool:
            return sum(map(bool, pool.map(describe, images)))

    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"image": images}), f"{folder}/images.parquet", row_group_size=128)

        def job(url: str) -> int:
            settings = [f"input={folder}/images.parquet", f"output={folder}/out", f"endpoint.url={url}"]
            settings += ["endpoint.model=x", f"endpoint.concurrency={options.concurrency}"]
            settings += [f"workers.count={options.workers}", "source.rows_per_piece=256"]
            caption.main([part for text in settings for part in ("--set", text)])
            return sum(pq.read_metadata(file).num_rows for file in Path(folder, "out").glob("part-*.parquet"))

        found = {
            name: measured(options.seconds, rows, requests, run) for name, run in (("threads", threads), ("job", job))
        }
    report(
        "captions",
        options.quick,
        ratio=round(found["job"][0] / found["threads"][0], 3),
        in_flight={name: round(share, 3) for name, (share, _) in found.items()},
        full={name: round(full, 3) for name, (_, full) in found.items()},
        rows=rows,
        requests=requests,
    )


if __name__ == "__main__":
    main()
