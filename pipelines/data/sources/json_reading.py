"""JSON files that do not fit into memory: lines, and lists whose items are read one by one.

Python's decoder keeps half a surrogate pair in a text, for the row to be rejected. The fast backend of ijson makes a
question mark of it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from longclip.errors import DataError
from pipelines.data.sources.text_decoding import undecoded

CHUNK = 1024 * 1024
MAX_CHARACTERS = 16 * 1024 * 1024
"""Maximum length of a line and of an item."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()

Item = tuple[int, Any, str | None]
"""(position, value, problem); the value is None where it cannot be parsed."""


def json_lines(text: TextIO, encoding: str) -> Iterator[Item]:
    """The values of a file with one in each line, by line number from 0; empty lines are passed over."""
    for number in range(1 << 62):
        line = text.readline(MAX_CHARACTERS)
        if not line:
            return
        if line.strip():
            try:
                value, problem = json.loads(line), None
            except (ValueError, RecursionError) as error:
                value, problem = None, f"line {number + 1} is not valid JSON: {error}"
            reason = undecoded(line, encoding)
            yield number, value, f"line {number + 1} {reason}" if reason else problem


def json_items(text: TextIO, encoding: str, key: str | None = None) -> Iterator[Item]:
    """The items of a list.

    Args:
        text: the file; its value is the list, or an object that has it.
        encoding: for messages.
        key: of the list in the object; None if the file is the list.

    Raises:
        DataError: the file is not valid JSON; the message begins with "is not".
    """
    reader = _Reader(text)
    if key is None:
        yield from _items(reader, encoding)
    else:
        reader.expect("{")
        while reader.peek() != "}":
            name, _ = reader.value()
            reader.expect(":")
            if reader.peek() == "[":
                items = _items(reader, encoding)
                if name == key:
                    yield from items
                else:
                    for _ in items:
                        pass
            else:
                reader.value()
            reader.separator("}")
        reader.expect("}")
    if reader.peek():
        raise reader.error("more text after the end")


def _items(reader: "_Reader", encoding: str) -> Iterator[Item]:
    reader.expect("[")
    number = 0
    while reader.peek() != "]":
        value, raw = reader.value()
        reason = undecoded(raw, encoding)
        yield number, value, f"entry {number + 1} {reason}" if reason else None
        number += 1
        reader.separator("]")
    reader.expect("]")


class _Reader:
    """Reads a file in chunks, value by value."""

    def __init__(self, text: TextIO) -> None:
        self.text = text
        self.buffer, self.position, self.before, self.ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.buffer, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.buffer) or self.ended:
                return self.buffer[self.position : self.position + 1]
            self._read()

    def expect(self, character: str) -> None:
        """Pass over this character."""
        if self.peek() != character:
            raise self.error(f"'{character}' expected")
        self.position += 1

    def separator(self, end: str) -> None:
        """Pass over the comma between two values; there is none before `end`."""
        if self.peek() != end:
            self.expect(",")
            if self.peek() == end:
                raise self.error(f"value expected before '{end}'")

    def value(self) -> tuple[Any, str]:
        """The next value, and its text."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
                if end < len(self.buffer) or self.ended:  # or else a number may continue in the next chunk
                    raw, self.position = self.buffer[self.position : end], end
                    return value, raw
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.buffer) - self.position > MAX_CHARACTERS:
                    raise self.error(str(getattr(error, "msg", error))) from error
            self._read()

    def error(self, reason: str) -> DataError:
        """What is wrong at the current position."""
        return DataError(f"is not valid JSON: {reason} at character {self.before + self.position}")

    def _read(self) -> None:
        remaining = self.buffer[self.position :]
        chunk = self.text.read(max(CHUNK, len(remaining)))  # doubles, so that long values are not parsed too often
        self.before += self.position
        self.buffer, self.position, self.ended = remaining + chunk, 0, not chunk
