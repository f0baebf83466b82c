"""Errors that a user can fix.

Every message is one line that names the field, the value, what is allowed and what to do next. Entry points print it
without a traceback and exit with `exit_code`. Any other exception is a bug and keeps its traceback.
"""


def one_line(error: object, limit: int = 300) -> str:
    """The message of a foreign error as one line of at most `limit` characters, to quote in our own."""
    return " ".join(str(error).split())[:limit]


class LongClipError(Exception):
    """Base of every error that a user can fix."""

    exit_code = 1


class ConfigError(LongClipError):
    """A setting is unknown, malformed or contradicts another setting."""

    exit_code = 2


class DataError(LongClipError):
    """An input file, column or row set cannot be used."""

    exit_code = 3


class CheckpointError(LongClipError):
    """A model cannot be read, is not a CLIP, or does not match what it is used with."""

    exit_code = 4


class TrainingError(LongClipError):
    """Training does not converge with these settings."""

    exit_code = 5


class PromotionError(LongClipError):
    """A candidate was not made champion, or the registry changed while that was decided."""

    exit_code = 6


class DiskFullError(LongClipError):
    """The disk is full. Nothing half-written is left under a final name."""

    exit_code = 7


class ImageError(DataError):
    """One image cannot be decoded. Jobs reject such rows and continue."""
