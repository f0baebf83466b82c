"""Texts cut to 77 tokens."""

import pytest

from longclip.text.shortening import shortened
from longclip.tokenizer import count_tokens, load_tokenizer

WORDS = "a dog runs over the wide green field "


def tokens(text: str) -> int:
    return count_tokens(load_tokenizer(None, 248), [text])[0]


def test_what_fits_is_kept() -> None:
    assert shortened("") == ""
    assert shortened("dog " * 75) == "dog " * 75
    assert shortened("dog " * 76) == ("dog " * 75).strip()


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (f"{WORDS * 7}, and a cat {WORDS * 5}", "field"),
        (f"{WORDS * 5}; a cat sits, with {WORDS * 9}", "a cat sits"),
        (f"{WORDS * 5}. A cat sits. {WORDS * 9}", "A cat sits."),
        (f'{WORDS * 5}, then a sign "one, two, three {WORDS * 6}" is seen', "field"),
        (f"{'dog ' * 73} and the {WORDS * 4}", "dog"),
        ("一只猫，" * 60, "猫"),
        ("猫" * 300, "猫"),
    ],
)
def test_long_texts_end_with_a_clause_or_a_word(text: str, end: str) -> None:
    summary = shortened(text)
    assert text.startswith(summary)
    assert summary.endswith(end)
    assert tokens(summary) <= 77
    assert len(summary) > 20


def test_a_word_is_never_divided() -> None:
    word = "xqz" * 100
    assert shortened(f"{word} and a dog") == word
