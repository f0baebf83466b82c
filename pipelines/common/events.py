"""Progress of a job as events: lines that every process of the job prints, and that its driver can listen to."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

RELAY = "progress-relay"
"""Name of the actor that hands over events of other processes than the driver."""
POLL_SECONDS = 0.5

_listeners: list[Callable[[str], None]] = []


def report(line: str) -> None:
    """Print a line of progress, and pass it to the listener of the job, if there is one."""
    print(line, flush=True)
    _send(line)


def warn(message: str) -> None:
    """Print a warning to stderr, and pass it to the listener of the job, if there is one."""
    line = f"warning: {message}"
    print(line, file=sys.stderr, flush=True)
    _send(line)


@contextlib.contextmanager
def listen(show: Callable[[str], None]) -> Iterator[None]:
    """Call `show` with every line of progress that any process of this job reports inside the block.

    Lines of other processes, such as the one that controls a training, arrive within `POLL_SECONDS`.
    """
    _listeners.append(show)
    try:
        with _relay(show) if _ray_runs() else contextlib.nullcontext():
            yield
    finally:
        _listeners.remove(show)


class Relay:
    """Holds events of other processes until the driver takes them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        """Keep a line until it is taken."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _send(line: str) -> None:
    for show in _listeners:
        show(line)
    if not _listeners and _ray_runs():
        import ray

        with contextlib.suppress(ValueError):  # nobody listens
            ray.get_actor(RELAY).add.remote(line)


@contextlib.contextmanager
def _relay(show: Callable[[str], None]) -> Iterator[None]:
    import ray

    relay: Any = ray.remote(num_cpus=0)(Relay).options(name=RELAY).remote()
    done = threading.Event()

    def poll() -> None:
        last = False
        while not last:
            last = done.wait(POLL_SECONDS)
            for line in ray.get(relay.take.remote()):
                show(line)

    ray.get(relay.take.remote())  # it can be found by name from here on
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        ray.kill(relay)


def _ray_runs() -> bool:
    """Whether this process belongs to a Ray; entries that need none do not import it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
