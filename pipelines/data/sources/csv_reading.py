"""Rows of CSV and TSV files, which begin with a header."""

import csv
from collections.abc import Iterator
from typing import TextIO

from longclip.errors import DataError
from pipelines.data.sources.json_reading import Item
from pipelines.data.sources.text_decoding import undecoded


def csv_rows(text: TextIO, encoding: str) -> Iterator[Item]:
    """The rows as objects by the names in the header; empty cells are absent. Tabs separate the cells if the header has
    one, commas otherwise.

    Raises:
        DataError: the file is not valid CSV; the message begins with "is not".
    """
    header = text.readline()
    separator = "\t" if "\t" in header else ","
    rows = csv.DictReader(text, next(csv.reader([header], delimiter=separator), []), delimiter=separator)
    try:
        for number, row in enumerate(rows):
            item = {key: value or None for key, value in row.items() if key is not None}
            reason = undecoded("".join(value for value in item.values() if value), encoding)
            problem = f"row {number + 1} {reason}" if reason else None
            yield number, item, problem or ("row has more cells than the header" if None in row else None)
    except csv.Error as error:
        raise DataError(f"is not valid CSV: {error} in line {rows.line_num + 1}") from error
