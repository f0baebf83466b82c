"""Annotation files of question sets: small, so they are read whole; what is wrong is an error that names the entry."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from upath import UPath

from longclip.errors import DataError
from pipelines.data.sources.text_decoding import decode_text, is_unicode


@dataclass(frozen=True)
class Annotations:
    """The directory of a set of questions."""

    field: str
    """Setting that names it, for messages."""
    root: UPath
    below: Sequence[str]
    """Possible places of the files in the directory; empty for the directory itself."""
    encoding: str

    def text(self, *names: str) -> tuple[UPath, str]:
        """Path and content of the first of these files that is there.

        Raises:
            DataError: none is there, or its text does not decode.
        """
        places = [self.root / folder if folder else self.root for folder in self.below]
        path = next((place / name for place in places for name in names if (place / name).is_file()), None)
        if path is None:
            raise DataError(f"{self.field}='{self.root}' has no {' or '.join(names)}; give the directory that has it")
        try:
            return path, decode_text(path.read_bytes(), self.encoding)
        except DataError as error:
            raise DataError(f"{self.field}: '{path}' {error}") from error

    def json_entries(self, name: str) -> Iterator["AnnotationEntry"]:
        """Entries of a JSON list, or of an object by its keys."""
        path, text = self.text(name)
        value = self._json(path, "", text)
        if not isinstance(value, dict | list):
            raise DataError(f"{self.field}: '{path}' is not a list or an object of entries")
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return (AnnotationEntry(self.field, path, str(key), item) for key, item in entries)

    def json_line_entries(self, *names: str) -> Iterator["AnnotationEntry"]:
        """Entries of a file with a JSON object in each line, by the number of the line from 1."""
        path, text = self.text(*names)
        for number, line in enumerate(text.split("\n"), 1):  # `splitlines` also cuts at characters within texts
            if line.strip():
                yield AnnotationEntry(self.field, path, str(number), self._json(path, f" in line {number}", line))

    def csv_entries(self, name: str) -> Iterator["AnnotationEntry"]:
        """Rows of a CSV file with a header, by the number of the row from 1."""
        path, text = self.text(name)
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
                yield AnnotationEntry(self.field, path, str(number), row)
        except csv.Error as error:
            raise DataError(f"{self.field}: '{path}' is not valid CSV: {error}") from error

    def _json(self, path: UPath, where: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.field}: '{path}' is not valid JSON{where}: {error}") from error


@dataclass(frozen=True)
class AnnotationEntry:
    """An entry of a file; each method raises `DataError` if the entry has no such value."""

    field: str
    path: UPath
    key: str
    value: Any

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self._get(name)
        if not isinstance(value, str) or not value.strip() or not is_unicode(value):
            raise self.error(f"has no text in '{name}'")
        return value

    def texts(self, name: str) -> list[str]:
        """A text, or a list of texts with at least one."""
        value = self._get(name)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(text, str) and text.strip() and is_unicode(text) for text in values):
            raise self.error(f"has no texts in '{name}'")
        return values

    def number(self, name: str) -> int:
        """A whole number, also as a text."""
        value = self._get(name)
        try:
            return int(value)
        except (TypeError, ValueError) as error:
            raise self.error(f"has no number in '{name}'") from error

    def box(self, name: str) -> tuple[float, float, float, float]:
        """Four numbers."""
        value = self._get(name)
        if not isinstance(value, list) or len(value) != 4 or not all(type(part) in (int, float) for part in value):
            raise self.error(f"has no box of four numbers in '{name}'")
        left, top, width, height = map(float, value)
        return left, top, width, height

    def error(self, problem: str) -> DataError:
        """What is wrong with the entry."""
        return DataError(f"{self.field}: entry {self.key} of '{self.path}' {problem}")

    def _get(self, name: str) -> Any:
        return self.value.get(name) if isinstance(self.value, dict) else None
