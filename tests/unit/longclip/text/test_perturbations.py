"""Changed captions and hard negatives: what is changed, where, and what is left alone."""

import re
from collections import Counter

import pytest

from longclip.text.perturbations import CHANGES, FAMILIES, KINDS, hard_negative, late_part
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


SENTENCES = [f"Sentence {number} is here." for number in range(20)]
CAPTION = " ".join(SENTENCES)


def change(name: str, caption: str, key: str = "a") -> str | None:
    """A change, by its name."""
    return CHANGES[name].apply(caption, key)


def test_random_changes_are_seeded_by_their_key() -> None:
    for name, properties in CHANGES.items():
        results = [change(name, CAPTION, key) for key in ("a", "a", "b")]
        assert results[0] == results[1] != CAPTION, name
        assert (results[0] != results[2]) is properties.is_random, name


def test_shuffled_sentences_are_all_kept() -> None:
    shuffled = change("sentences_shuffled", CAPTION) or ""
    assert sorted(map(tidy, split_sentences(shuffled))) == sorted(SENTENCES)


def test_half_of_the_words_keep_their_order() -> None:
    halved = (change("half_of_words_dropped", CAPTION) or "").split()
    assert len(halved) == len(CAPTION.split()) // 2
    rest = iter(CAPTION.split())
    assert all(word in rest for word in halved)


@pytest.mark.parametrize(("name", "count"), [("two_sentences_sampled", 2), ("three_sentences_sampled", 3)])
def test_sampled_sentences_keep_their_order(name: str, count: int) -> None:
    samples = {change(name, CAPTION, str(key)) or "" for key in range(50)}
    assert len(samples) > 40
    for sample in samples:
        places = [SENTENCES.index(tidy(sentence)) for sentence in split_sentences(sample)]
        assert len(places) == count
        assert places == sorted(set(places))
    firsts = Counter(sample.startswith(SENTENCES[0]) for sample in samples)
    assert firsts[False] > firsts[True] > 0, "the first sentence is drawn as often as the others"


def test_the_first_sentence_is_dropped_or_moved() -> None:
    assert change("first_sentence_dropped", "A cat sits.  It sleeps.\nIt is red.") == "It sleeps. It is red."
    first, *rest = SENTENCES
    assert change("first_sentence_fourth", CAPTION) == " ".join([*rest[:3], first, *rest[3:]])
    assert change("first_sentence_fourth", " ".join(SENTENCES[:4])) == " ".join([*rest[:3], first])


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        *(("first_sentence_dropped", 2), ("sentences_shuffled", 2), ("two_sentences_sampled", 3)),
        *(("three_sentences_sampled", 4), ("first_sentence_fourth", 4)),
    ],
)
def test_captions_with_too_few_sentences_are_left_as_they_are(name: str, sentences: int) -> None:
    assert change(name, " ".join(SENTENCES[:sentences])) is not None
    for count in range(sentences):
        assert change(name, " ".join(SENTENCES[:count])) is None


def test_a_single_word_is_left_as_it_is() -> None:
    assert change("half_of_words_dropped", "word") is change("half_of_words_dropped", "") is None
    assert change("half_of_words_dropped", "two words") in ("two", "words")
