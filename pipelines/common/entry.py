"""Exit codes of the entries, and errors that a user can fix as one line."""

import sys
from collections.abc import Callable
from typing import NoReturn

from longclip.errors import DiskFullError, LongClipError, one_line
from pipelines.common.storage import MAKE_ROOM, disk_is_full


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
