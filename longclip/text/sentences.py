"""Sentences of a caption, and summaries that need no model.

A summary strategy takes a caption and a key (usually the row's id) and returns a short text. Strategies that draw at
random are seeded by the key, so a rerun on any number of workers gives the same summaries.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Strategy = Literal["first_sentence", "extractive", "drop_first", "random_sentences"]
Summarizer = Callable[[str, str], str]
"""(caption, key) -> summary."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|No|vs|etc|e\.g|i\.e|approx|[A-Z])\.$")
_ENDED = re.compile(r"[.!?][\"')\]]*$")
_FIRST_LETTER = re.compile(r"[^\W_]")
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_STOP_WORDS = frozenset(
    _WORD.findall(
        "a an and are as at be been being but by for from had has have he her his i in into is it its of on one or"
        " over she some than that the their them there these they this those to two under was were which while who with"
    )
)


def caption_text(cell: str | Sequence[str | None] | None) -> str:
    """The text that the caption cell of a row stands for.

    Several captions of one image become one paragraph in which each is a sentence of its own, so that every strategy
    works on them; the most central sentence is then the most central caption.

    Args:
        cell: one caption, which stays as it is, several, or none.
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    captions = [" ".join(caption.split()) for caption in cell if caption]
    captions = [caption for caption in captions if caption]
    return captions[0] if len(captions) == 1 else " ".join(map(_as_sentence, captions))


def _as_sentence(caption: str) -> str:
    """A caption as `split_sentences` sees one: with a capital in front and a full stop behind, if it has none."""
    caption = _FIRST_LETTER.sub(lambda letter: letter.group().upper(), caption, count=1)
    return caption if _ENDED.search(caption) else f"{caption.rstrip(',;:')}."


def split_sentences(caption: str) -> list[str]:
    """Sentences of a caption, stripped, none empty; common abbreviations do not end one."""
    sentences: list[str] = []
    for piece in _SENTENCE_END.split(" ".join(caption.split())):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {piece}"
        elif piece:
            sentences.append(piece)
    return sentences


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return _WORD.findall(text.lower())


def content_words(text: str) -> list[str]:
    """Lower-case words of a text without the function words."""
    return [word for word in words(text) if word not in _STOP_WORDS]


def first_sentence(caption: str, key: str) -> str:
    """Everything before the first ". ", exactly as the official training code cuts it."""
    return caption.split(". ")[0]


def extractive(caption: str, key: str) -> str:
    """The sentence whose content words lie nearest (cosine) to those of the whole caption; the earlier one in a tie."""
    sentences = split_sentences(caption)
    if len(sentences) < 2:
        return caption.strip()
    whole = Counter(content_words(caption))

    def centrality(sentence: str) -> float:
        own = Counter(content_words(sentence))
        norm = math.sqrt(sum(count * count for count in own.values()))
        return sum(count * whole[word] for word, count in own.items()) / norm if norm else 0.0

    return max(sentences, key=centrality)


def drop_first(caption: str, key: str) -> str:
    """The caption without its first sentence: training on it keeps the first sentence from being a shortcut."""
    sentences = split_sentences(caption)
    return " ".join(sentences[1:]) or caption.strip()


def random_sentences(caption: str, key: str, count: int = 2) -> str:
    """`count` sentences drawn by the key, in the caption's order."""
    sentences = split_sentences(caption)
    if len(sentences) <= count:
        return caption.strip()
    chosen = sorted(drawn_by(caption, key).sample(range(len(sentences)), count))
    return " ".join(sentences[index] for index in chosen)


def shuffle_sentences(caption: str, key: str) -> str:
    """All sentences in an order drawn by the key."""
    sentences = split_sentences(caption)
    drawn_by(caption, key).shuffle(sentences)
    return " ".join(sentences)


def drop_words(caption: str, key: str, share: float = 0.5) -> str:
    """The caption without a share of its words, drawn by the key; one is kept at least."""
    kept = caption.split()
    count = max(1, round(len(kept) * (1 - share)))
    return " ".join(kept[place] for place in sorted(drawn_by(caption, key).sample(range(len(kept)), count)))


def drawn_by(caption: str, key: str) -> random.Random:
    """A source of chance that depends on a caption and a key alone."""
    return random.Random(hashlib.sha256(f"{key}\0{caption}".encode()).digest())


_SUMMARIZERS: dict[str, Summarizer] = {
    "first_sentence": first_sentence,
    "extractive": extractive,
    "drop_first": drop_first,
    "random_sentences": random_sentences,
}


def summarizer(strategy: str) -> Summarizer:
    """The summarizer of a strategy's name; `KeyError` for any other."""
    return _SUMMARIZERS[strategy]


_CHANGES: dict[str, Summarizer] = {
    "sentences_shuffled": shuffle_sentences,
    "first_sentence_dropped": drop_first,
    "half_of_words_dropped": drop_words,
}
CHANGES: tuple[str, ...] = tuple(_CHANGES)
"""Names of what can be done to a caption to see what a model reads of it."""


def changer(name: str) -> Summarizer:
    """The change of a name in `CHANGES`; `KeyError` for any other."""
    return _CHANGES[name]
