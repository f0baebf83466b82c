"""Sentence splitting and the summaries that need no model."""

import subprocess
import sys
from typing import get_args

import pytest

from longclip.text.sentences import (
    STRATEGIES,
    Strategy,
    caption_text,
    changer,
    content_words,
    split_sentences,
    summarizer,
)

CAPTION = "A red bus waits. Two people board the red bus. The sky is grey. A dog runs past the bus stop."


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
def test_caption_cells_become_one_text(cell: str | list[str | None] | None, text: str) -> None:
    assert caption_text(cell) == text


def test_of_several_captions_the_central_one_is_extracted() -> None:
    cell = ["a dog", "a brown dog runs on a beach", "the brown dog runs", "beach in summer", "animals"]
    assert len(split_sentences(caption_text(cell))) == len(cell)
    assert summarizer("extractive")(caption_text(cell), "k") == "A brown dog runs on a beach."


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


def test_every_strategy_has_a_summarizer() -> None:
    assert get_args(Strategy) == STRATEGIES
    for strategy in STRATEGIES:
        summary = summarizer(strategy)(CAPTION, "key")
        assert summary
        assert len(summary) < len(CAPTION)
    with pytest.raises(KeyError):
        summarizer("best")


def test_first_sentence_is_cut_as_officially() -> None:
    assert summarizer("first_sentence")("A bus. Then. More", "k") == "A bus"
    assert summarizer("first_sentence")("Dr. Smith waves. He leaves.", "k") == "Dr"
    assert summarizer("first_sentence")("no end", "k") == "no end"


def test_extractive_takes_the_central_sentence() -> None:
    assert summarizer("extractive")(CAPTION, "k") == "Two people board the red bus."
    assert summarizer("extractive")("Cats sit. Cats sit. Cats sit.", "k") == "Cats sit."
    assert summarizer("extractive")(" Only one. ", "k") == "Only one."
    assert summarizer("extractive")("It is. They are. That was.", "k") == "It is."


def test_drop_first() -> None:
    assert summarizer("drop_first")(CAPTION, "k") == CAPTION.split(". ", 1)[1]
    assert summarizer("drop_first")(" Only one. ", "k") == "Only one."


def test_random_sentences_keep_their_order_and_vary() -> None:
    sentences = split_sentences(CAPTION)
    draws = {summarizer("random_sentences")(CAPTION, str(key)) for key in range(50)}
    assert 4 <= len(draws) <= 6
    for draw in draws:
        chosen = [sentences.index(sentence) for sentence in split_sentences(draw)]
        assert len(chosen) == 2
        assert chosen == sorted(chosen)
    assert summarizer("random_sentences")("One. Two.", "k") == "One. Two."


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_summaries_depend_on_key_and_caption_only(strategy: str) -> None:
    summarize = summarizer(strategy)
    assert [summarize(CAPTION, f"row-{n}") for n in range(9)] == [summarize(CAPTION, f"row-{n}") for n in range(9)]


def test_summaries_are_equal_in_another_process() -> None:
    code = (
        "import importlib.util, sys;"
        "spec = importlib.util.spec_from_file_location('captions', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec);"
        "spec.loader.exec_module(module);"
        "print(*(module.random_sentences(sys.argv[2], f'row-{n}') for n in range(9)), sep='|')"
    )
    source = sys.modules["longclip.text.sentences"].__file__
    assert source is not None
    printed = subprocess.run(
        [sys.executable, "-c", code, source, CAPTION],
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert printed.split("|") == [summarizer("random_sentences")(CAPTION, f"row-{n}") for n in range(9)]


def test_changes_keep_what_they_say() -> None:
    caption = " ".join(f"Sentence {number} stands here." for number in range(20))
    shuffled = changer("sentences_shuffled")(caption, "a")
    assert sorted(split_sentences(shuffled)) == sorted(split_sentences(caption))
    assert shuffled != caption
    assert shuffled == changer("sentences_shuffled")(caption, "a")
    assert shuffled != changer("sentences_shuffled")(caption, "b")
    halved = changer("half_of_words_dropped")(caption, "a").split()
    assert len(halved) == len(caption.split()) // 2
    rest = iter(caption.split())
    assert all(word in rest for word in halved), "the words that are left keep their order"
    assert changer("half_of_words_dropped")("word", "a") == "word"
    assert changer("first_sentence_dropped")(caption, "a") == caption.partition(" stands here. ")[2]
