"""Peak memory of `prepare` over few and over ten times as many rows: it must not grow with them.

Counted is the proportional set size of the driver and all processes below it, Ray's shared memory included, ten times a
second. The rival is what holding the rows would take: the bytes of the input. First the outputs are checked: all rows.

    python tests/bench/bench_memory.py [--quick]

The last line is JSON; `ratio` is the peak with many rows over the peak with few.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness import arguments, report
from photographs import photograph

ROOT = Path(__file__).resolve().parents[2]
FILES = 64
SAMPLE_SECONDS = 0.1


def write(path: Path, rows: int) -> int:
    """An input of so many rows of their own bytes; gives its size."""
    images = [photograph(480, 360, seed) for seed in range(FILES)]
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, rows, 500):
            numbers = range(start, min(rows, start + 500))
            # Bytes behind the end of a JPEG make it another file; decoders pass over them.
            cells = [images[row % FILES] + row.to_bytes(8, "big") for row in numbers]
            texts = [f"Picture {row} shows soft shapes. They have many colours." for row in numbers]
            writer.write_table(pa.table([[str(row) for row in numbers], cells, texts], schema))
    return path.stat().st_size


def tree(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    found, fresh = {root}, {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(found)


def megabytes(pids: list[int]) -> float:
    """Their memory; what several share is counted once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def peak(source: Path, output: Path, rows: int) -> tuple[float, float]:
    """Peak megabytes and seconds of a prepare job in processes of its own."""
    settings = [f"input={source}", f"output={output}", "deduplicate=none"]
    command = [sys.executable, "pipelines/prepare.py", *(part for text in settings for part in ("--set", text))]
    start, most = time.perf_counter(), 0.0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            most = max(most, megabytes(tree(process.pid)))
            time.sleep(SAMPLE_SECONDS)
        text = process.stdout.read().decode() if process.stdout else ""
    seconds = time.perf_counter() - start
    if process.returncode or json.loads((output / "_manifest.json").read_text())["counts"]["rows_out"] != rows:
        sys.exit(f"error: prepare did not give {rows} rows:\n{text}")
    return most, seconds


def main() -> None:
    """Measure, report."""
    quick = arguments(__doc__).quick
    sizes = (200, 2000) if quick else (2000, 20_000)
    peaks, inputs = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        for rows in sizes:
            source = Path(directory) / f"{rows}.parquet"
            inputs[rows] = write(source, rows) / 2**20
            peaks[rows], seconds = peak(source, Path(directory) / f"out-{rows}", rows)
            print(f"{rows} rows, {inputs[rows]:.0f} MiB: peak {peaks[rows]:.0f} MiB, {seconds:.1f} s", flush=True)
    small, large = sizes
    report(
        "memory",
        quick,
        ratio=round(peaks[large] / peaks[small], 3),
        peak_megabytes={str(rows): round(value) for rows, value in peaks.items()},
        input_megabytes={str(rows): round(value) for rows, value in inputs.items()},
        grown_share_of_input=round((peaks[large] - peaks[small]) / (inputs[large] - inputs[small]), 3),
    )


if __name__ == "__main__":
    main()
