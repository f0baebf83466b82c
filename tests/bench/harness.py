"""What all benchmarks share: runs of rivals that alternate, medians, and one line of figures at the end."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def arguments(description: str | None, **options: dict[str, Any]) -> argparse.Namespace:
    """Command line of a benchmark: `quick` asks for less than 50 seconds, `options` are its own (see argparse)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds, less than 50 seconds")
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    return parser.parse_args()


def alternating(
    rivals: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each rival, over rounds in which all of them run one after the other.

    `time.process_time` as the clock counts the work of this process and not what else the machine does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(bench: str, quick: bool, **figures: Any) -> None:
    """Print the figures as one line of JSON, the last of a benchmark."""
    print(json.dumps({"bench": bench, "quick": quick, **figures}), flush=True)
