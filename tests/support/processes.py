"""Processes that tests freeze, or end without notice."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

DEADLINE_SECONDS = 60
AGENTS = ("DashboardAgent", "RuntimeEnvAgent")
"""Processes of Ray that do no work, and stay for a minute after their driver."""


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    """`kill -9` of a driver, and return when Ray's own processes, which it started, have ended with it."""
    process.send_signal(signal.SIGSTOP)  # at once: finding its processes takes a moment
    children = processes_below(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    send(signal.SIGCONT, [pid for pid, _ in children])  # what a test froze notices only now that its driver is gone
    send(signal.SIGKILL, [pid for pid, name in children if any(agent in name for agent in AGENTS)])
    end = time.monotonic() + DEADLINE_SECONDS
    while any(is_running(pid) for pid, _ in children):
        assert time.monotonic() < end, "processes of a killed job stayed"
        time.sleep(0.1)


@contextlib.contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """Stop processes while the block runs, so that what the test does next happens in the middle of their work."""
    pids = list(pids)
    send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        send(signal.SIGCONT, pids)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to those processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_below(parent: int) -> list[tuple[int, str]]:
    """(process id, command line) of all descendants of a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has just ended
    below, found = {parent}, []
    while fresh := {pid for pid, above in parents.items() if above in below} - below:
        below |= fresh
        found += [(pid, names[pid]) for pid in fresh]
    return found
