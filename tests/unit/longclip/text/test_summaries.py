"""Summary strategies that need no model."""

import subprocess
import sys
from typing import get_args

import pytest

from longclip.text.sentences import caption_text, split_sentences
from longclip.text.summaries import STRATEGIES, Strategy, summarizer
from tests.support.places import ROOT

CAPTION = "A red bus waits. Two people board the red bus. The sky is grey. A dog runs past the bus stop."


def test_central_caption_of_several_is_extracted() -> None:
    cell = ["a dog", "a brown dog runs on a beach", "the brown dog runs", "beach in summer", "animals"]
    assert len(split_sentences(caption_text(cell))) == len(cell)
    assert summarizer("extractive")(caption_text(cell), "k") == "A brown dog runs on a beach."


def test_every_strategy_has_a_summarizer() -> None:
    assert get_args(Strategy) == STRATEGIES
    for strategy in STRATEGIES:
        summary = summarizer(strategy)(CAPTION, "key")
        assert summary
        assert len(summary) < len(CAPTION)
    with pytest.raises(KeyError):
        summarizer("best")


def test_first_sentence_equals_the_official_code() -> None:
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
def test_summaries_depend_only_on_key_and_caption(strategy: str) -> None:
    summarize = summarizer(strategy)
    assert [summarize(CAPTION, f"row-{n}") for n in range(9)] == [summarize(CAPTION, f"row-{n}") for n in range(9)]


def test_summaries_are_equal_in_another_process() -> None:
    code = (
        "import sys; from longclip.text.summaries import random_sentences;"
        "print(*(random_sentences(sys.argv[1], f'row-{n}') for n in range(9)), sep='|')"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, CAPTION],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert printed.split("|") == [summarizer("random_sentences")(CAPTION, f"row-{n}") for n in range(9)]
