"""Text files: byte-order marks, encodings, and why a text cannot be decoded. Nothing is replaced or guessed."""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from upath import UPath

from longclip.errors import DataError

MARK = "\ufeff"
"""A byte-order mark, decoded."""

MARKED_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DEFAULT = "utf-8"
HINT = "name the encoding with --set source.encoding=<name>, such as cp1252 or utf-16-le"


def decode_text(content: bytes, encoding: str = DEFAULT) -> str:
    """The text of a file or cell, without a byte-order mark.

    Args:
        content: the bytes.
        encoding: of texts without a byte-order mark.

    Raises:
        DataError: they do not decode; the message begins with "is not".
    """
    name = _encoding(content, encoding)
    try:
        text = content.decode(name).removeprefix(MARK)
    except UnicodeError as error:
        raise DataError(f"is not valid {name} ({getattr(error, 'reason', error)}); {HINT}") from error
    if "\0" in text:
        raise DataError(f"is not {name} text: it has NUL characters; {HINT}")
    return text


@contextmanager
def open_text(path: UPath, encoding: str = DEFAULT) -> Iterator[TextIO]:
    """A text file, without its byte-order mark. Bytes that do not decode are surrogates (PEP 383) in the text, if the
    encoding extends ASCII: see `undecoded`.

    Raises:
        DataError: the file has NUL characters, as UTF-16 without a byte-order mark has; the message begins with "is".
        UnicodeDecodeError: in the block, for other encodings.
    """
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        name = _encoding(head, encoding)
        if b"\0" in head and not name.startswith(("utf-16", "utf-32")):
            raise DataError(f"is not {name} text: it has NUL bytes; {HINT}")
        with io.TextIOWrapper(file, encoding=name, errors="surrogateescape", newline="\n") as text:
            yield text


def undecoded(text: str, encoding: str = DEFAULT) -> str | None:
    """Why a part of a text file that was read with `open_text` is unusable; None if it is not."""
    return f"is not valid {encoding}; {HINT}" if not is_unicode(text) else None


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, limit: int | None = None) -> str:
    """A text for messages and ids: surrogates as escapes, and at most `limit` characters."""
    text = text.encode(errors="backslashreplace").decode()
    return text if limit is None or len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _encoding(content: bytes, encoding: str) -> str:
    """The encoding of a byte-order mark, or else the given one."""
    marked = next((name for mark, name in MARKED_ENCODINGS.items() if content.startswith(mark)), None)
    return marked or encoding
