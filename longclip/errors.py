"""Errors that a user can cause and mend.

Every message is one line that names the field, the value, what is allowed and what to do next. Entry points print
it without a traceback and exit with `exit_code`; anything else that is raised is a bug and keeps its traceback.
"""


def one_line(error: object, limit: int = 300) -> str:
    """What somebody else's error says, or a text of theirs, fit for a message of ours: at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


class LongClipError(Exception):
    """Base of every error a user can mend."""

    exit_code = 1


class ConfigError(LongClipError):
    """A setting is unknown, malformed or contradicts another one."""

    exit_code = 2


class DataError(LongClipError):
    """An input file, column or row set cannot be used."""

    exit_code = 3


class CheckpointError(LongClipError):
    """A model cannot be read, is no CLIP, or does not match what it is used with."""

    exit_code = 4


class TrainingError(LongClipError):
    """Training does not converge with these settings."""

    exit_code = 5


class PromotionError(LongClipError):
    """A candidate was not made champion, or the registry changed while that was decided."""

    exit_code = 6


class DiskFullError(LongClipError):
    """What was written did not fit; nothing half-written is left where others read."""

    exit_code = 7


class ImageError(DataError):
    """One image cannot be decoded. Rows that raise it are quarantined, not fatal."""
