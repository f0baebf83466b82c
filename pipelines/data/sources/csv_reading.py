"""CSV and TSV files, record by record: one that is misquoted neither swallows its neighbours nor changes in silence."""

import csv
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from longclip.errors import DataError
from pipelines.data.sources.json_reading import MAX_CHARACTERS, Item
from pipelines.data.sources.text_decoding import undecoded

MAX_LINES = 256
"""Maximum number of lines of a record. A quotation mark that is never closed would take all that follow."""

Record = tuple[int, list[str], str | None]
"""(number of the first line, cells, problem); a record with a problem is one line without cells."""


def csv_rows(text: TextIO, encoding: str) -> Iterator[Item]:
    """The rows as objects by the names in the header; empty cells are absent.

    Raises:
        DataError: the header is not valid CSV; the message begins with "is not".
    """
    names: list[str] | None = None
    for number, (line, cells, problem) in enumerate(csv_records(text)):
        if names is None:
            if problem:
                raise DataError(f"is not valid CSV: {problem} in line {line}")
            names = cells
            continue
        item = {name: value or None for name, value in zip(names, cells, strict=False)}
        reason = undecoded("".join(cells), encoding)
        problem = f"row {number} {reason}" if reason else problem and f"line {line} is not valid CSV: {problem}"
        too_many = "row has more cells than the header" if len(cells) > len(names) else None
        yield number - 1, item, problem or too_many


def csv_records(text: TextIO) -> Iterator[Record]:
    """The records of a file; empty lines are passed over. After a problem, the next line is read.

    Tabs separate the cells if the first line has one, commas otherwise.
    """
    csv.field_size_limit(MAX_CHARACTERS)
    lines: deque[str] = deque()  # that were read ahead
    separator = ""
    number = 1
    while True:
        record: list[str] = []
        while True:
            line = lines[len(record)] if len(record) < len(lines) else text.readline(MAX_CHARACTERS)
            if len(record) == len(lines) and line:
                lines.append(line)
            if line:
                record.append(line)
            if not record:
                return
            separator = separator or ("\t" if "\t" in line else ",")
            try:
                cells = next(csv.reader(record, delimiter=separator, strict=True), [])
                problem = None
            except csv.Error as error:
                problem = str(error)
                if line and problem == "unexpected end of data" and len(record) < MAX_LINES:
                    continue
                cells, record = [], record[:1]
            break
        for _ in record:
            lines.popleft()
        if cells or problem:
            yield number, cells, problem
        number += len(record)
