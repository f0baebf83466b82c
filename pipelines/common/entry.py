"""What every entry does around its work: one-line errors, a Ray cluster, a summary at the end."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import ray

from longclip.errors import DiskFullError, LongClipError, one_line
from pipelines.common.events import report
from pipelines.common.progress import tell_pieces, tell_rows
from pipelines.common.storage import MAKE_ROOM, disk_is_full


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run an entry and exit: 0 when it worked, one line and the error's own code when the user can mend it."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(cause.exit_code)
    sys.exit(0)


def user_error(error: BaseException) -> LongClipError | None:
    """The user's mistake behind an error that crossed processes, or None where there is none.

    Ray wraps an exception of a worker in its own types, some of them more than once.
    """
    seen: set[int] = set()
    candidates: list[BaseException | None] = [error]
    while candidates:
        candidate = candidates.pop()
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        # Ray's wrapper is also an instance of what it wraps, but prints as a traceback: look inside it first.
        inner = getattr(candidate, "cause", None)
        if isinstance(candidate, LongClipError) and not isinstance(inner, BaseException):
            return candidate
        if disk_is_full(candidate):
            return DiskFullError(f"{one_line(candidate)}; {MAKE_ROOM}")
        candidates += [candidate.__cause__, candidate.__context__, inner]
        candidates += list((getattr(candidate, "worker_failures", None) or {}).values())
    return None


def connect(min_cpus: int) -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside submitted jobs), or start Ray on this machine.

    A local Ray counts at least `min_cpus` logical CPUs, however few the machine has: training workers reserve theirs,
    and a data pipeline without any left waits for ever.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, logging_level="warning")
        else:
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, min_cpus), logging_level="warning")
    data_context()


def data_context() -> ray.data.DataContext:
    """What all our datasets have in common, in this process."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    # A block is handed on when it is full: small ones bring the first batch early and bound the memory.
    context.target_max_block_size = 16 * 1024 * 1024
    # Ray Data's own wrapper forgets, on its way between processes, which error it wraps.
    context.raise_original_map_exception = True
    return context


class Progress:
    """Seconds since the start of an entry, how far it is, and its closing line."""

    SHOW_EVERY_SECONDS = 5.0

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.started = self.shown = time.monotonic()

    def show(self, stage: str, done: int, of: int, rows: int, rejected: int) -> None:
        """Tell how far a stage is: Prometheus always, the reader at most once in some seconds, and at its end."""
        tell_pieces(self.verb, stage, done, of)
        tell_rows(self.verb, stage, rows, rejected)
        now = time.monotonic()
        if done == of or now - self.shown >= self.SHOW_EVERY_SECONDS:
            self.shown = now
            seconds = now - self.started
            report(f"{self.verb}: {stage} {done}/{of} pieces, {rows} rows, {rejected} rejected, {seconds:.0f} s")

    def summary(self, rows_in: int, rows_out: int, rejected: int, detail: str = "") -> None:
        """Print `verb: rows in, out, rejected, seconds` and what came of it."""
        seconds = time.monotonic() - self.started
        tail = f"; {detail}" if detail else ""
        counts = f"{rows_in} rows in, {rows_out} out, {rejected} rejected"
        report(f"{self.verb}: {counts}, {seconds:.1f} s{tail}")
