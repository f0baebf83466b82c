"""Summaries of captions that need no model.

A strategy takes a caption and a key (usually the row's id) and returns a short text. Random strategies are seeded by
the key, so a rerun on any number of workers gives the same summaries.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Literal, get_args

from longclip.text.sentences import content_words, split_sentences

Strategy = Literal["first_sentence", "extractive", "drop_first", "random_sentences"]
Summarizer = Callable[[str, str], str]
"""(caption, key) -> summary."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)


def first_sentence(caption: str, key: str) -> str:
    """Everything before the first ". ", exactly as the official training code cuts it."""
    return caption.split(". ")[0]


def extractive(caption: str, key: str) -> str:
    """The sentence whose content words are most similar (cosine) to the whole caption's; the first of equal ones."""
    sentences = split_sentences(caption)
    if len(sentences) < 2:
        return caption.strip()
    whole = Counter(content_words(caption))

    def centrality(sentence: str) -> float:
        counts = Counter(content_words(sentence))
        norm = math.sqrt(sum(count * count for count in counts.values()))
        return sum(count * whole[word] for word, count in counts.items()) / norm if norm else 0.0

    return max(sentences, key=centrality)


def drop_first(caption: str, key: str) -> str:
    """The caption without its first sentence: training on it keeps the first sentence from being a shortcut."""
    sentences = split_sentences(caption)
    return " ".join(sentences[1:]) or caption.strip()


def random_sentences(caption: str, key: str, count: int = 2) -> str:
    """`count` random sentences, seeded by the key, in the caption's order."""
    sentences = split_sentences(caption)
    if len(sentences) <= count:
        return caption.strip()
    chosen = sorted(drawn_by(caption, key).sample(range(len(sentences)), count))
    return " ".join(sentences[index] for index in chosen)


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
