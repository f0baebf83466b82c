"""The output directory of a benchmark: one run at a time writes to it, and every file in it is whole at any time."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from longclip.errors import LongClipError
from pipelines.common.lease import Lease
from pipelines.common.run_directory import refuse_other_output

RESULTS = "results.json"
"""Written last: present if, and only if, the benchmark is complete."""

REPORT, REPORT_PAGE = "report.md", "report.html"
MEASURED, RANKS, SCORES, RUNNING = "measured", "ranks", "scores", ".running"


@dataclass(frozen=True)
class BenchmarkOutput:
    """A directory that this run alone writes to."""

    path: Path
    lease: Lease

    @property
    def scratch(self) -> Path:
        """Directory for unfinished files, which the next run empties."""
        return self.path / RUNNING

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file with `write`, and move it to its place. If it writes none, an earlier file is removed.

        Raises:
            LongClipError: another job took the directory, because this process was suspended.
        """
        unfinished = self.scratch / "unfinished"
        write(unfinished)
        target = self.path / name
        self.lease.check()
        if unfinished.exists():
            os.chmod(unfinished, 0o644)  # safetensors writes files that only their owner can read
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished, target)
        else:
            target.unlink(missing_ok=True)

    def put_text(self, name: str, text: str) -> None:
        """`put` for a text."""
        self.put(name, lambda path: path.write_text(text))

    def remove_all_but(self, results: set[str], tables: set[str]) -> None:
        """Remove `RESULTS`, the reports, and other results and tables (ranks, scores) of earlier runs than these."""
        self.lease.check()
        for name in (RESULTS, REPORT, REPORT_PAGE):
            (self.path / name).unlink(missing_ok=True)
        files = [(self.path, "*.json", results), *((self.path / name, "*", tables) for name in (RANKS, SCORES))]
        for folder, pattern, kept in files:
            for file in folder.glob(pattern):
                if file.name not in kept:
                    file.unlink()


def _is_benchmark(directory: Path) -> bool:
    return (directory / RESULTS).is_file() or (directory / RUNNING).is_dir() or any(directory.glob(f"{MEASURED}/*/*"))


@contextmanager
def claim_output(path: Path) -> Iterator[BenchmarkOutput]:
    """Hold a directory while the block runs. What is in it is kept; a new one without a result is removed.

    Raises:
        ConfigError: it was not made by a benchmark, or another one is writing to it.
    """
    refuse_other_output("output", path, _is_benchmark)
    running = path / RUNNING
    running.mkdir(parents=True, exist_ok=True)
    try:
        with Lease(UPath(running / "lease"), str(path)) as lease:
            _empty(running)
            try:
                yield BenchmarkOutput(path, lease)
            finally:
                with suppress(LongClipError):  # another job has it now
                    lease.check()
                    _empty(running)
    finally:
        with suppress(OSError):  # not empty
            running.rmdir()
            path.rmdir()


def _empty(running: Path) -> None:
    """Remove what a killed run left, but not the lease."""
    for entry in running.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != "lease":
            entry.unlink(missing_ok=True)
