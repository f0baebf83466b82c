"""Numerics, then speed, of the training step on one GPU; one JSON file with every figure. Run it by `check.sh`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from numerics import numerics
from speed import Budget, pcm_times, step_times

MODELS = ("B/32", "B/16", "L/14")
SECONDS = 300
"""After these, no further measurement is started."""


def main() -> int:
    """Measure, write, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu-check.json"), help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, in a minute")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; run this on a GPU, or with --small on a CPU", file=sys.stderr)
        return 2
    device = "cpu" if options.small else "cuda"
    if options.small:
        torch.set_num_threads(1)
    started = time.monotonic()
    report: dict[str, Any] = {
        "device": "cpu" if options.small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numerics": numerics(device),
    }
    for check in report["numerics"]:
        verdict = "ok  " if check["passed"] else "FAIL"
        print(f"{verdict} {check['name']}: {check['error']:.1e} (limit {check['limit']:.0e})")
    budget = Budget(started + SECONDS)
    models = ["tiny"] if options.small else MODELS
    report["steps"] = [row for model in models for row in step_times(model, device, budget)]
    report["pcm"] = pcm_times(device, [(64, 32)] if options.small else [(1024, 512), (1024, 768), (4096, 768)])
    report["left_out"] = budget.left_out
    report["seconds"] = round(time.monotonic() - started, 1)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print_tables(report)
    return 0 if all(check["passed"] for check in report["numerics"]) else 1


def print_tables(report: dict[str, Any]) -> None:
    """The figures as Markdown, for docs/performance.md."""
    print(f"\n{report['device']}, torch {report['torch']}, transformers {report['transformers']}\n")
    print(
        "| model | step | batch | s | pairs/s | peak memory, GiB | share of bf16 peak |\n|---|---|---|---|---|---|---|"
    )
    for row in report["steps"]:
        cells = [row["model"], row["step"], row["batch"], row["seconds"], row["pairs_per_second"]]
        cells += [row["peak_gib"], f"{row['share_of_peak']:.1%}" if row["share_of_peak"] is not None else "-"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print("\n| rows x columns | eigh, ms | PCM forward + backward, ms |\n|---|---|---|")
    for row in report["pcm"]:
        print(f"| {row['rows']} x {row['columns']} | {row['eigh_ms']} | {row['pcm_ms']} |")
    for line in report["left_out"]:
        print(f"left out: {line}")
    print(f"{report['seconds']} s in all")


if __name__ == "__main__":
    sys.exit(main())
