"""Changed captions and hard negatives: what is changed, where, and what is left alone."""

import re
from collections import Counter

import pytest

from longclip.text.perturbations import FAMILIES, KINDS, changer, hard_negative, late_part
from longclip.text.sentences import split_sentences, tidy, words
from longclip.tokenizer import build_tokenizer, count_tokens

TOKENIZER = build_tokenizer(248)
FILLER = "So it goes on. " * 20  # 100 tokens
FAMILY_OF = {word: family for family, members in FAMILIES.items() for word in members}


def changed_words(caption: str, negative: str) -> list[tuple[str, str]]:
    return [pair for pair in zip(words(caption), words(negative), strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("key", [str(key) for key in range(20)])
def test_only_late_words_of_a_family_are_changed(key: str) -> None:
    head = "A red cup stands left of two blue doors. "
    caption = head + FILLER + "Three small GREEN cups stand below the black table, and a large white one above it."
    replaced = hard_negative("replaced", caption, key, TOKENIZER)
    assert replaced is not None
    ((word, other),) = changed_words(caption, replaced)
    assert FAMILY_OF[word] == FAMILY_OF[other]
    assert replaced.startswith(head)
    exchanged = hard_negative("exchanged", caption, key, TOKENIZER)
    assert exchanged is not None
    (one, other), (back, again) = changed_words(caption, exchanged)
    assert (one, other) == (again, back)
    assert FAMILY_OF[one] == FAMILY_OF[other]
    assert Counter(words(exchanged)) == Counter(words(caption))
    assert exchanged == hard_negative("exchanged", caption, key, TOKENIZER)


def test_different_keys_change_different_words() -> None:
    caption = FILLER + "A red cup, a blue bowl and a green plate stand below three white lamps."
    for kind in KINDS:
        assert len({hard_negative(kind, caption, str(key), TOKENIZER) for key in range(20)}) > 3


@pytest.mark.parametrize(
    ("tail", "replaceable", "exchangeable"),
    [
        ("Nothing more is said.", False, False),
        ("A red cup.", True, False),
        ("A red cup and a red bowl.", True, False),
        ("A red cup and a blue bowl.", True, True),
        ("A cup that is red and blue.", True, False),  # blue and red is the same
        ("Lamps stand on the left and the right.", True, False),
        ("It goes from the left to the right.", True, True),
        ("Right below it, one orange stands at a right angle; somebody wears a top.", True, False),  # but "below"
        ("Somebody in a top is right, and has left.", False, False),
        ("The upper part hangs above it.", True, False),  # two families
    ],
)
def test_attributes_that_can_be_changed(tail: str, replaceable: bool, exchangeable: bool) -> None:
    found = [hard_negative(kind, FILLER + tail, "a", TOKENIZER) is not None for kind in ("replaced", "exchanged")]
    assert found == [replaceable, exchangeable]


def test_capital_letters_are_kept() -> None:
    negative = hard_negative("exchanged", FILLER + "Red cups stand on a table, with a blue bowl.", "a", TOKENIZER)
    assert negative == FILLER + "Blue cups stand on a table, with a red bowl."


def test_late_part_is_between_77_and_248_tokens() -> None:
    for count in (71, 72, 73, 150, 245, 246, 247, 300):  # and start, end and full stop
        caption = "cat " * count + "."
        start, end = late_part(caption, TOKENIZER)
        tokens = count_tokens(TOKENIZER, [caption])[0]
        assert len(re.findall("cat", caption[:start])) == min(count, 75 if tokens > 77 else count)
        assert len(re.findall("cat", caption[:end])) == min(count, 246 if tokens > 248 else count)


def test_changes_are_reproducible_and_keep_the_rest() -> None:
    caption = " ".join(f"Sentence {number} stands here." for number in range(20))
    shuffled = changer("sentences_shuffled")(caption, "a")
    assert sorted(map(tidy, split_sentences(shuffled))) == sorted(map(tidy, split_sentences(caption)))
    assert shuffled != caption
    assert shuffled == changer("sentences_shuffled")(caption, "a")
    assert shuffled != changer("sentences_shuffled")(caption, "b")
    halved = changer("half_of_words_dropped")(caption, "a").split()
    assert len(halved) == len(caption.split()) // 2
    rest = iter(caption.split())
    assert all(word in rest for word in halved), "the words that are left keep their order"
    assert changer("half_of_words_dropped")("word", "a") == "word"
    assert changer("first_sentence_dropped")(caption, "a") == caption.partition(" stands here. ")[2]
