"""Captions: the texts in the cells of all kinds that data sets have."""

import json
import re
from typing import Any

import pytest

from pipelines.data.sources.captions import caption_texts

TURNS = [
    {"from": "human", "value": "<image>\nDescribe it."},
    {"from": "gpt", "value": "A red car."},
    {"from": "human", "value": "And the sky?"},
    {"from": "gpt", "value": "It is grey."},
]


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("A red car.", ["A red car."]),
        (["One.", None, "Two."], ["One.", "Two."]),
        (TURNS, ["A red car."]),
        (json.dumps(TURNS), ["A red car."]),
        ({"from": ["human", "gpt"], "value": ["Describe it.", "A red car."]}, ["A red car."]),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "A red car."}], ["A red car."]),
        ([{"role": "assistant", "content": [{"type": "text", "text": "A red car."}]}], ["A red car."]),
        ([{"caption": "One.", "id": 1}, {"caption": "Two.", "id": 2}], ["One.", "Two."]),
        ([{"raw": "One.", "tokens": ["One"]}], ["One."]),
        ("Größe".encode(), ["Größe"]),
        ("\ufeffA red car.", ["A red car."]),
        ("[sic] a 'car'", ["[sic] a 'car'"]),
        ('["a", "sign"]', ['["a", "sign"]']),
    ],
)
def test_texts_of_a_cell(cell: Any, texts: list[str]) -> None:
    assert caption_texts(cell) == (texts, None)


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (None, "caption is missing"),
        (7, "caption is not a text but int"),
        (["One.", 7], "caption is not a text but int"),
        ([{"id": 1}], "caption is not a text but dict"),
        (TURNS[:1], "conversation has no answer of a model"),
        (b"caf\xe9", "caption is not valid utf-8 .*; name the encoding with --set source.encoding="),
    ],
)
def test_cells_without_a_text_say_why(cell: Any, problem: str) -> None:
    texts, reason = caption_texts(cell)
    assert texts == []
    assert reason is not None
    assert re.search(problem, reason)


def test_bytes_are_read_in_the_named_encoding() -> None:
    assert caption_texts(b"caf\xe9", "latin-1") == (["café"], None)
    assert caption_texts("café".encode("utf-16"), "latin-1") == (["café"], None), "a byte-order mark comes first"
