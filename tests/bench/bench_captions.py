"""Requests in flight of `caption.py`, against a stand-in for a server that answers after a second.

    python tests/bench/bench_captions.py [--rows 2000] [--concurrency 16] [--seconds 0.5] [--workers 1]

The server runs in a process of its own, and counts how many requests it holds, from the first one until fewer are left
to come than may be in flight. Prints the average as a share of the stated number, and the share of the time in which
it held at least 95 % of that number. The goal is 95 % on average.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    requests = arguments.concurrency * arguments.workers
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(arguments.seconds, arguments.rows, requests, there), daemon=True
    )
    server.start()
    url = here.recv()
    with tempfile.TemporaryDirectory() as folder:
        images = [encoded(photograph(number, SIZE), quality=90) for number in range(arguments.rows)]
        pq.write_table(pa.table({"image": images}), f"{folder}/images.parquet", row_group_size=128)
        settings = [f"input={folder}/images.parquet", f"output={folder}/out", f"endpoint.url={url}", "endpoint.model=x"]
        settings += [f"endpoint.concurrency={arguments.concurrency}", f"workers.count={arguments.workers}"]
        settings += ["source.rows_per_piece=256"]
        started = time.monotonic()
        caption.main([part for text in settings for part in ("--set", text)])
        seconds = time.monotonic() - started
    here.send("stop")
    samples = here.recv()
    share = sum(samples) / len(samples) / requests
    full = sum(sample >= 0.95 * requests for sample in samples) / len(samples)
    print(
        f"captions: {arguments.rows} rows in {seconds:.1f} s; {share:.3f} of {requests} requests in flight on average"
    )
    print(f"captions: at least 95 % of them in {full:.3f} of the time; {len(samples)} samples")


if __name__ == "__main__":
    main()
