"""Summaries of captions that need no model.

A strategy takes a caption and a key (usually the row's id) and returns a short text. Random strategies are seeded by
the key, so a rerun on any number of workers gives the same summaries.

For a caption with words no summary is empty or a mere number, and none of a caption of several sentences is all of it.
Summaries are cut to CLIP's 77 tokens, see `longclip.text.shortening`; only `drop_first` gives longer ones on purpose.
"""

import hashlib
import random
import re
from collections.abc import Callable
from typing import Literal, get_args

from longclip.text.salience import most_salient
from longclip.text.sentences import split_sentences, tidy
from longclip.text.shortening import shortened

Strategy = Literal["first_sentence", "extractive", "drop_first", "random_sentences"]
Summarizer = Callable[[str, str], str]
"""(caption, key) -> summary."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)

_HAS_WORD = re.compile(r"[^\W\d_]{2}|[^\W\d_a-zA-Z]")


def summary_sentences(caption: str) -> list[str]:
    """The sentences that a summary may consist of: those with a word; if none has one, the whole caption."""
    sentences = [tidy(piece) for piece in split_sentences(caption) if _HAS_WORD.search(piece)]
    return sentences or [tidy(caption)]


def first_sentence(caption: str, key: str) -> str:
    """The official training code's summary, everything before the first ". ", where a sentence ends there.

    Where none does ("Mt. Fuji", "1. A cat"), and where that would be all of a caption of several sentences, it is the
    first sentence.
    """
    official = caption.split(". ")[0]
    pieces = split_sentences(caption)
    rest = caption[len(official) + 1 :].lstrip()
    ends = {0}
    for piece in reversed(pieces[1:]):
        ends.add(max(ends) + len(piece))
    if len(rest) in ends and (rest or len(pieces) < 2) and _HAS_WORD.search(official):
        return shortened(tidy(official))
    return shortened(summary_sentences(caption)[0].removesuffix("."))


def extractive(caption: str, key: str) -> str:
    """The sentence that best says what the picture is of, see `longclip.text.salience`."""
    return shortened(most_salient(summary_sentences(caption)))


def drop_first(caption: str, key: str) -> str:
    """The caption without its first sentence: training on it keeps the first sentence from being a shortcut."""
    rest = tidy("".join(split_sentences(caption)[1:]))
    return rest if _HAS_WORD.search(rest) else shortened(summary_sentences(caption)[0])


def random_sentences(caption: str, key: str, count: int = 2) -> str:
    """`count` random sentences, seeded by the key, in the caption's order; never all of several."""
    sentences = summary_sentences(caption)
    chosen = drawn_by(caption, key).sample(range(len(sentences)), max(1, min(count, len(sentences) - 1)))
    return shortened(" ".join(sentences[index] for index in sorted(chosen)))


def drawn_by(caption: str, key: str) -> random.Random:
    """A random generator seeded by a caption and a key alone."""
    return random.Random(hashlib.sha256(f"{key}\0{caption}".encode()).digest())


_SUMMARIZERS: dict[str, Summarizer] = {
    "first_sentence": first_sentence,
    "extractive": extractive,
    "drop_first": drop_first,
    "random_sentences": random_sentences,
}


def summarizer(strategy: str) -> Summarizer:
    """The summarizer of a strategy, one of `STRATEGIES`; raises `KeyError` for any other."""
    return _SUMMARIZERS[strategy]
