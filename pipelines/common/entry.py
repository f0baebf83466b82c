"""Exit codes of the entries, and errors that a user can fix as one line."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from longclip.errors import ConfigError, DiskFullError, LongClipError, one_line
from pipelines.common.storage import MAKE_ROOM, disk_is_full

UNUSABLE_PATHS = {
    errno.EEXIST: "it exists and is not a directory",
    errno.ENOTDIR: "a part of it is a file, not a directory",
    errno.EISDIR: "it is a directory, not a file",
    errno.EACCES: "this user has no permission for it",
    errno.EPERM: "this user has no permission for it",
    errno.EROFS: "its file system is read-only",
    errno.ENAMETOOLONG: "it is too long for its file system",
    errno.ELOOP: "it is a symbolic link that leads back to itself",
}
"""Errors of the operating system that a setting with another path avoids."""


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run an entry and exit: 0 for success; one line and the error's exit code if the user can fix it."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        # Our messages are one line. Ray Data appends advice about its own retries to those of a worker.
        print(f"error: {str(cause).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(cause.exit_code)
    sys.exit(0)


def user_error(error: BaseException) -> LongClipError | None:
    """The error that a user can fix behind an error that crossed processes; None if there is none.

    Ray wraps an exception of a worker in its own types, some of them more than once.
    """
    for candidate in _behind(error, with_context=True):
        if isinstance(candidate, LongClipError):
            return candidate
        if disk_is_full(candidate):
            return DiskFullError(f"{one_line(candidate)}; {MAKE_ROOM}")
    # An error that was handled before another one was raised (its context) does not explain that other one.
    for candidate in _behind(error, with_context=False):
        if isinstance(candidate, OSError) and candidate.filename and candidate.errno in UNUSABLE_PATHS:
            path = os.fsdecode(candidate.filename)
            return ConfigError(
                f"the path '{path}' cannot be used: {UNUSABLE_PATHS[candidate.errno]}; change the setting that names"
                " it, or the file that is in its way"
            )
    return None


def _behind(error: BaseException, with_context: bool) -> Iterator[BaseException]:
    """The error and those that caused it, without the wrappers of Ray."""
    seen: set[int] = set()
    candidates: list[BaseException | None] = [error]
    while candidates:
        candidate = candidates.pop()
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        # Ray's wrapper is also an instance of what it wraps, but prints as a traceback: look inside it first.
        inner = getattr(candidate, "cause", None)
        if not isinstance(inner, BaseException):
            yield candidate
        candidates += [candidate.__cause__, candidate.__context__ if with_context else None, inner]
        candidates += list((getattr(candidate, "worker_failures", None) or {}).values())
