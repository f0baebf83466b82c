"""Summary strategies that need no model."""

import csv
import hashlib
import re
import subprocess
import sys
from typing import get_args

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.text.sentences import caption_text, split_sentences, tidy
from longclip.text.summaries import STRATEGIES, Strategy, summarizer, summary_sentences
from longclip.tokenizer import count_tokens, load_tokenizer
from tests.support.places import ROOT, SHARED

LONG_CAPTIONS = SHARED / "data" / "long-texts" / "long_captions.parquet"
JUDGEMENT = ROOT / "docs" / "summaries" / "extractive_judgement.csv"

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


def test_first_sentence_is_the_official_cut_where_a_sentence_ends() -> None:
    for caption in ("A bus. Then. More", "A cat! A dog. More", "no end", "Only one. ", "It is. It was."):
        assert summarizer("first_sentence")(caption, "k") == caption.split(". ")[0]
    assert summarizer("first_sentence")("Dr. Smith waves. He leaves.", "k") == "Dr. Smith waves"
    assert summarizer("first_sentence")("1. A cat sits. 2. A dog runs.", "k") == "1. A cat sits"
    assert summarizer("first_sentence")("What is it? A dog! It runs.", "k") == "What is it?"


@pytest.mark.parametrize(
    ("caption", "summary"),
    [
        (CAPTION, "A red bus waits."),
        ("Cats sit. Cats sit. Cats sit.", "Cats sit."),
        (" Only one. ", "Only one."),
        ("It is. They are. That was.", "It is."),
        ("It is a bright, sunny day. A castle stands on a green hill above a lake.", 1),
        ("Daytime. Bright and sunny outside. A yellow fire hydrant is fixed into an area of concrete.", 2),
        ("On the left, there is a lamp. It is red. This is a photo of a red lamp in a kitchen with a table.", 2),
        ("The sky is very dark. The focus of the image is a hotel with three floors.", 1),
        ("3. 5. A boat.", "A boat."),
        ("一只猫坐在垫子上。它是黑色的！", "一只猫坐在垫子上。"),
    ],
)
def test_extractive_takes_the_sentence_that_says_what_the_picture_is_of(caption: str, summary: str | int) -> None:
    expected = summary_sentences(caption)[summary] if isinstance(summary, int) else summary
    assert summarizer("extractive")(caption, "k") == expected


def test_drop_first() -> None:
    assert summarizer("drop_first")(CAPTION, "k") == CAPTION.split(". ", 1)[1]
    assert summarizer("drop_first")(" Only one. ", "k") == "Only one."


def test_random_sentences_keep_their_order_and_vary() -> None:
    sentences = summary_sentences(CAPTION)
    draws = {summarizer("random_sentences")(CAPTION, str(key)) for key in range(50)}
    assert 4 <= len(draws) <= 6
    for draw in draws:
        chosen = [sentences.index(sentence) for sentence in summary_sentences(draw)]
        assert len(chosen) == 2
        assert chosen == sorted(chosen)
    assert summarizer("random_sentences")("One. Two.", "k") in ("One.", "Two.")


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


def problem(strategy: str, caption: str) -> str | None:
    """What is wrong with the summary of a caption that has words, or None."""
    summary = summarizer(strategy)(caption, "key")
    if not re.search(r"[^\W\d_]{2}", summary):
        return "no word"
    if len(split_sentences(caption)) > 1 and len(tidy(summary)) >= len(tidy(caption)):
        return "as long as its caption"
    if not re.sub(r"[.\s]", "", caption).count(re.sub(r"[.\s]", "", summary)) and strategy != "random_sentences":
        return "not from the caption"
    following = tidy(caption).partition(summary)[2][:1]
    if strategy in ("extractive", "drop_first") and summary[-1].isalnum() and following.isalnum():
        return "half a word"
    tokens = count_tokens(load_tokenizer(None, 248), [summary])[0]
    return "more than 77 tokens" if tokens > 77 and strategy != "drop_first" else None


SENTENCES = st.lists(
    st.sampled_from(["A cat", "a red bus", "Mt. Fuji", "No. 5", "the U.S. flag", "3.5 ft.", "wide", "and", "which"]),
    min_size=1,
)
CAPTIONS = st.lists(
    st.tuples(SENTENCES, st.sampled_from([". ", "! ", ", ", ".\n\n", "; ", '." ', "? "])), min_size=1
).map(lambda parts: "Here " + "".join(" ".join(words) + end for words, end in parts))


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)  # the first example loads the tokenizer
@given(caption=CAPTIONS)
def test_summaries_of_made_captions(strategy: str, caption: str) -> None:
    assert problem(strategy, caption) is None


@pytest.mark.skipif(not LONG_CAPTIONS.exists(), reason=f"the captions are not there: {LONG_CAPTIONS}")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_summaries_of_real_captions(strategy: str) -> None:
    captions = pq.read_table(LONG_CAPTIONS, columns=["caption"])["caption"].to_pylist()
    assert [(caption, found) for caption in captions if (found := problem(strategy, caption))] == []


def test_extractive_summaries_are_those_that_were_judged() -> None:
    with JUDGEMENT.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    assert sum(row["says_what_it_is_of"] == "yes" for row in rows) >= 90
    captions = {(row["source"], row["id"]): row["caption"] for row in rows if row["caption"]}
    if LONG_CAPTIONS.exists():
        captions = {(row["source"], row["id"]): row["caption"] for row in pq.read_table(LONG_CAPTIONS).to_pylist()}
    judged = [row for row in rows if (row["source"], row["id"]) in captions]
    assert len(judged) >= 50
    for row in judged:
        summary = summarizer("extractive")(captions[row["source"], row["id"]], "k")
        assert hashlib.sha256(summary.encode()).hexdigest() == row["summary_sha256"], row["id"]
