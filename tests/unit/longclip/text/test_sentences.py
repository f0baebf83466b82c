"""Sentences and words of captions."""

import pytest

from longclip.text.sentences import caption_text, content_words, split_sentences


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Smith meets Mrs. Jones. They talk.", ["Dr. Smith meets Mrs. Jones.", "They talk."]),
        ("A sign reads St. Pauls. It is old.", ["A sign reads St. Pauls.", "It is old."]),
        ("Tools, e.g. Hammers, lie there. Nails too.", ["Tools, e.g. Hammers, lie there.", "Nails too."]),
        ("John F. Kennedy waves. Crowds cheer.", ["John F. Kennedy waves.", "Crowds cheer."]),
        ("It costs 3.50 dollars. Cheap.", ["It costs 3.50 dollars.", "Cheap."]),
        ('He says "stop." She stops.', ['He says "stop.', "She stops."]),
        ("Seen at 5 p.m. in the rain. It pours.", ["Seen at 5 p.m. in the rain.", "It pours."]),
        ("  Spaces\n\nand lines.\tAll   gone. ", ["Spaces and lines.", "All gone."]),
        ("It ends... 3 cats follow.", ["It ends...", "3 cats follow."]),
        ("no capital. follows here", ["no capital. follows here"]),
        ("", []),
        ("   ", []),
    ],
)
def test_split_sentences(caption: str, sentences: list[str]) -> None:
    assert split_sentences(caption) == sentences


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("  stays. as it is ", "  stays. as it is "),
        (None, ""),
        ([], ""),
        ([None, " "], ""),
        (["one alone stays as it is "], "one alone stays as it is"),
        (["a red bus", "Two people wait."], "A red bus. Two people wait."),
        (
            ["ends in,", '"stop" says a sign', "really?", 'he says "no."'],
            'Ends in. "Stop" says a sign. Really? He says "no."',
        ),
        (["two\n lines", "3 cats", "élan"], "Two lines. 3 cats. Élan."),
    ],
)
def test_caption_lists_become_one_text(cell: str | list[str | None] | None, text: str) -> None:
    assert caption_text(cell) == text


def test_content_words_leave_function_words_out() -> None:
    assert content_words("The dog's ball is ON a well-kept lawn, 2 metres away") == [
        "dog's",
        "ball",
        "well-kept",
        "lawn",
        "2",
        "metres",
        "away",
    ]
