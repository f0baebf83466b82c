"""What the library's commands share: one line on standard error, and an exit status, for errors that a user can fix."""

import sys
from collections.abc import Callable

from longclip.errors import LongClipError


def run_command(command: Callable[[], str]) -> int:
    """Run a command and print the summary that it returns; returns the exit status."""
    from transformers.utils import logging  # only now: `--help` must not wait for it

    logging.disable_progress_bar()
    try:
        print(command())
    except LongClipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # unreadable source, full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return LongClipError.exit_code
    return 0
