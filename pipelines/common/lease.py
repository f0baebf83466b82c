"""A lease: the right of one running job to write in a place, on any storage.

The owner renews it by writing a new beat. Whoever finds one watches it for a while: a lease whose beat stands still was
left by a job that was killed. Nothing depends on clocks that agree.
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

BEAT_SECONDS = 3.0
WATCH_SECONDS = 12.0
SETTLE_SECONDS = 1.0


class Lease:
    """Context that owns a lease file; entering refuses while another job owns it."""

    def __init__(self, path: UPath, place: str) -> None:
        """
        Args:
            path: the lease file.
            place: what is owned, for messages.
        """
        self.path, self.place = path, place
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
            time.sleep(SETTLE_SECONDS)  # another job may have taken the same dead lease: the last to write has it
            self.check()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise `LongClipError` if another job has taken the lease, which it does when this one stood still."""
        if not self._stop.is_set() and (self._lost or self._read().get("owner") != self.owner):
            self._lost = True
            raise LongClipError(
                f"output='{self.place}' was taken over by another job while this one stood still; nothing was published"
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
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if self._read().get("owner") != self.owner:
                    self._lost = True
                    return
                self._write()
            except Exception:
                continue  # storage that fails now fails for a rival as well; the next beat tries again

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
            # Where the reply to a create was lost, its retry finds the file that the first try made.
            return self._read().get("owner") == self.owner
        return True

    def _write(self) -> None:
        if is_local(self.path):
            aside = f"{self.path.path}.{self.owner}"
            with open(aside, "wb") as file:
                file.write(self._content())
            os.replace(aside, self.path.path)
        else:
            self.path.fs.pipe_file(self.path.path, self._content())

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.fs.cat_file(self.path.path))
        except (FileNotFoundError, ValueError):
            return {}

    def _wait_for_death(self) -> None:
        """Return when the lease's owner is dead; refuse when it moves."""
        first = self._read()
        if first.get("host") == socket.gethostname() and not _is_running(first.get("pid")):
            return
        print(
            f"output='{self.place}' was in use; watching for {WATCH_SECONDS:.0f} s whether that job lives", flush=True
        )
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 4))
            if self._read() != first:
                raise ConfigError(
                    f"output='{self.place}' is being written by another job (process {first.get('pid')} on"
                    f" {first.get('host')}); wait until it has ended, or choose another output"
                )


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
