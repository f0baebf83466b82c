"""A lease: the exclusive right of one running job to write to an output, on any storage.

The owner renews it by increasing a heartbeat counter in a file. Another job that finds the file watches it for some
seconds: if the heartbeat does not change, the owner was killed. Clocks of the machines need not agree.
"""

import json
import os
import socket
import threading
import time
import uuid
from typing import Any, Self

from upath import UPath

from longclip.errors import ConfigError, LongClipError
from pipelines.common.storage import is_local

HEARTBEAT_SECONDS = 3.0
WATCH_SECONDS = 12.0
SETTLE_SECONDS = 1.0


class Lease:
    """Context manager that owns a lease file."""

    def __init__(self, path: UPath, output: str) -> None:
        """
        Args:
            path: the lease file.
            output: what is owned, for messages.
        """
        self.path, self.output = path, output
        self.owner = uuid.uuid4().hex
        self._beat = 0
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            ConfigError: a running job owns it.
        """
        if not self._create():
            self._wait_for_death()
            self._write()
            time.sleep(SETTLE_SECONDS)  # another job may take the same dead lease: the last one to write owns it
            self.check()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise `LongClipError` if another job took the lease because this one had stopped renewing it."""
        if not self._stop.is_set() and (self._lost or self._read().get("owner") != self.owner):
            self._lost = True
            raise LongClipError(
                f"output='{self.output}' was taken over by another job while this one was suspended; nothing was"
                " published"
            )

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._lost:
            self.path.fs.rm_file(self.path.path)

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if self._read().get("owner") != self.owner:
                    self._lost = True
                    return
                self._write()
            except Exception:
                continue  # storage that fails now fails for other jobs too; the next heartbeat tries again

    def _content(self) -> bytes:
        self._beat += 1
        content = {"owner": self.owner, "host": socket.gethostname(), "pid": os.getpid(), "beat": self._beat}
        return json.dumps(content).encode()

    def _create(self) -> bool:
        try:
            self.path.fs.pipe_file(self.path.path, self._content(), mode="create")
        except OSError:
            if not self.path.exists():
                raise
            # If the reply to a create was lost, its retry finds the file of the first attempt.
            return self._read().get("owner") == self.owner
        return True

    def _write(self) -> None:
        if is_local(self.path):
            temporary = f"{self.path.path}.{self.owner}"
            with open(temporary, "wb") as file:
                file.write(self._content())
            os.replace(temporary, self.path.path)
        else:
            self.path.fs.pipe_file(self.path.path, self._content())

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.fs.cat_file(self.path.path))
        except (FileNotFoundError, ValueError):
            return {}

    def _wait_for_death(self) -> None:
        """Return when the owner is dead; raise `ConfigError` if its heartbeat changes."""
        first = self._read()
        if first.get("host") == socket.gethostname() and not _is_running(first.get("pid")):
            return
        print(
            f"output='{self.output}' was in use; checking for {WATCH_SECONDS:.0f} s whether that job still runs",
            flush=True,
        )
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 4))
            if self._read() != first:
                raise ConfigError(
                    f"output='{self.output}' is being written by another job (process {first.get('pid')} on"
                    f" {first.get('host')}); wait until it ends, or choose another output"
                )


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
