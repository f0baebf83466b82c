"""Progress of a job: for the user as events, and for Prometheus through the exporter that Ray runs on every node.

A value is exported as long as the process that set it lives, so an alert about a job ends with the job.
"""

import time
from functools import cache
from typing import TYPE_CHECKING

from pipelines.common.events import report

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


class Progress:
    """Elapsed time of an entry, its progress, and its summary line."""

    SHOW_EVERY_SECONDS = 5.0

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.started = self.shown = time.monotonic()

    def show(self, stage: str, done: int, of: int, rows: int, rejected: int) -> None:
        """Report finished pieces of a stage: always to Prometheus, to the user every few seconds and at the end."""
        export_pieces(self.verb, stage, done, of)
        export_rows(self.verb, stage, rows, rejected)
        now = time.monotonic()
        if done == of or now - self.shown >= self.SHOW_EVERY_SECONDS:
            self.shown = now
            seconds = now - self.started
            report(f"{self.verb}: {stage} {done}/{of} pieces, {rows} rows, {rejected} rejected, {seconds:.0f} s")

    def summary(self, rows_in: int, rows_out: int, rejected: int, detail: str = "") -> None:
        """Report `verb: rows in, out, rejected, seconds`, and details of the result."""
        seconds = time.monotonic() - self.started
        tail = f"; {detail}" if detail else ""
        counts = f"{rows_in} rows in, {rows_out} out, {rejected} rejected"
        rate = f", {rows_in / seconds:,.{0 if rows_in >= 100 * seconds else 1}f} rows/s" if rows_in > 1 else ""
        report(f"{self.verb}: {counts}, {seconds:.1f} s{rate}{tail}")


@cache
def gauge(name: str, description: str, *tags: str) -> "Gauge":
    """The gauge `longclip_<name>`, created when it is first set: it belongs to the Ray its process is connected to."""
    from ray.util.metrics import Gauge  # entries that run no job do without Ray

    return Gauge(f"longclip_{name}", description, tags)


def export_pieces(verb: str, stage: str, done: int, of: int) -> None:
    """Export the finished pieces of a stage, and their total."""
    tags = {"job": verb, "stage": stage}
    gauge("job_pieces_done", "Pieces of a stage that are done.", "job", "stage").set(done, tags)
    gauge("job_pieces", "Pieces of a stage.", "job", "stage").set(of, tags)


def export_rows(verb: str, stage: str, rows: int, rejected: int) -> None:
    """Export the finished rows of a stage, and how many of them were rejected."""
    tags = {"job": verb, "stage": stage}
    gauge("job_rows", "Rows of a stage that are done.", "job", "stage").set(rows, tags)
    gauge("job_rows_rejected", "Rows of a stage that could not be used.", "job", "stage").set(rejected, tags)
