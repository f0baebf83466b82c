"""Captions changed on purpose, to measure what a model reads of them.

`CHANGES` are applied to whole captions: sentences are dropped, shuffled, sampled or moved, or words are dropped. A
caption with too few sentences or words for a change is not changed.

Hard negatives have a wrong attribute in the late part of a caption, where a model of 77 tokens cannot see it. A model
that only collects words finds an image by its late words and still does not know which object is red and which is blue.
There are two kinds, after SugarCrepe (arXiv 2306.14610) and ARO (arXiv 2210.01936): `replaced` replaces a word with
another one of the same family; `exchanged` swaps two words of a family, which keeps the caption's bag of words.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from longclip.constants import CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH
from longclip.text.sentences import split_sentences, tidy
from longclip.text.summaries import drawn_by

if TYPE_CHECKING:  # transformers takes seconds to import, and only the tokenizer's type is needed
    from transformers import CLIPTokenizer


FOURTH = 3
"""Position, from 0, to which the first sentence is moved, after DeBias-CLIP (arXiv 2602.22419)."""


@dataclass(frozen=True)
class Change:
    """A change to whole captions."""

    apply: Callable[[str, str], str | None]
    """(caption, key) -> changed caption, or None if the caption is too short for the change."""
    is_random: bool
    """Whether another key gives another result."""


def shuffle_sentences(caption: str, key: str) -> str | None:
    """All sentences in a random order; None for a single sentence."""
    sentences = _sentences(caption)
    drawn_by(caption, key).shuffle(sentences)
    return " ".join(sentences) if len(sentences) > 1 else None


def drop_first_sentence(caption: str, key: str) -> str | None:
    """All sentences but the first; None for a single sentence."""
    return " ".join(_sentences(caption)[1:]) or None


def first_sentence_fourth(caption: str, key: str) -> str | None:
    """The first sentence moved behind the next three; None for fewer than four sentences."""
    first, *rest = _sentences(caption) or [""]
    return " ".join([*rest[:FOURTH], first, *rest[FOURTH:]]) if len(rest) >= FOURTH else None


def sample_sentences(caption: str, key: str, count: int) -> str | None:
    """`count` random sentences in the caption's order; None if it has no more than these."""
    sentences = _sentences(caption)
    if len(sentences) <= count:
        return None
    return " ".join(sentences[place] for place in sorted(drawn_by(caption, key).sample(range(len(sentences)), count)))


def drop_words(caption: str, key: str, share: float = 0.5) -> str | None:
    """The caption without a random share (0 to 1) of its words, of which at least one stays; None for a single word."""
    words = caption.split()
    count = max(1, round(len(words) * (1 - share)))
    kept = drawn_by(caption, key).sample(range(len(words)), min(count, len(words)))
    return " ".join(words[place] for place in sorted(kept)) if len(words) > 1 else None


def _sentences(caption: str) -> list[str]:
    return [sentence for sentence in map(tidy, split_sentences(caption)) if sentence]


CHANGES: dict[str, Change] = {
    "half_of_words_dropped": Change(drop_words, is_random=True),
    "first_sentence_dropped": Change(drop_first_sentence, is_random=False),
    "sentences_shuffled": Change(shuffle_sentences, is_random=True),
    "two_sentences_sampled": Change(partial(sample_sentences, count=2), is_random=True),
    "three_sentences_sampled": Change(partial(sample_sentences, count=3), is_random=True),
    "first_sentence_fourth": Change(first_sentence_fourth, is_random=False),
}
"""Changes to whole captions by their names."""


FAMILIES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "beige"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "side": ("left", "right"),
    "height": ("top", "bottom"),
    "edge": ("upper", "lower"),
    "order": ("above", "below"),
    "size": ("small", "large"),
    "material": ("wooden", "metal", "plastic", "leather", "concrete", "brick"),
    "pattern": ("striped", "plain", "checkered", "dotted", "floral"),
}
"""Words that can replace each other. Words that would need different grammar ("one", "orange") are left out."""

_FAMILY_OF = {word: family for family, members in FAMILIES.items() for word in members}
# In "right below it" and "wearing a top" these words are not positions: ambiguous words count only after certain words.
_PLACED = "|".join(
    rf"(?<=\b{before} )" for before in ("the", "top", "bottom", "upper", "lower", "far", "its", "their", "your")
)
_AMBIGUOUS = ("right", "left", "top", "bottom")
_WORDS = "|".join(word for word in _FAMILY_OF if word not in _AMBIGUOUS)
_MENTION = re.compile(rf"\b(?:{_WORDS}|(?:{_PLACED})(?:{'|'.join(_AMBIGUOUS)}))\b", re.IGNORECASE)
_LISTED = re.compile(r"[\s,/-]*(?:\b(?:and|or)\b[\s,]*)?(?:\b(?:the|an?)\b\s*)?", re.IGNORECASE)
"""Text between listed words: swapping them, as in "on the left and the right", does not change the meaning."""


def hard_negative(kind: str, caption: str, key: str, tokenizer: "CLIPTokenizer") -> str | None:
    """A caption with a wrong attribute after token 77; the key seeds which one.

    Args:
        kind: one of `KINDS`.
        caption: the correct caption.
        key: the same key gives the same result.
        tokenizer: a CLIP tokenizer.

    Returns:
        The changed caption, or None if there is no attribute to change.

    Raises:
        KeyError: the kind is unknown.
    """
    make = _KINDS[kind]
    start, end = late_part(caption, tokenizer)
    mentions = [match for match in _MENTION.finditer(caption) if start <= match.start() and match.end() <= end]
    return make(caption, mentions, drawn_by(caption, key))


def late_part(caption: str, tokenizer: "CLIPTokenizer") -> tuple[int, int]:
    """Start and end, in characters, of the text that a model of 248 tokens reads and one of 77 tokens does not."""
    offsets = tokenizer.backend_tokenizer.encode(caption).offsets

    def cut(tokens: int) -> int:
        # The end token takes the last position: of 77 tokens the first 76 are read.
        return offsets[tokens - 1][0] if len(offsets) > tokens else len(caption)

    return cut(CLIP_CONTEXT_LENGTH), cut(LONG_CLIP_CONTEXT_LENGTH)


def _replaced(caption: str, mentions: list[re.Match[str]], draw: random.Random) -> str | None:
    if not mentions:
        return None
    mention = draw.choice(mentions)
    word = mention.group().lower()
    others = [other for other in FAMILIES[_FAMILY_OF[word]] if other != word]
    return _with_words(caption, [(mention, draw.choice(others))])


def _exchanged(caption: str, mentions: list[re.Match[str]], draw: random.Random) -> str | None:
    pairs = [
        (one, other)
        for one, other in combinations(mentions, 2)
        if one.group().lower() != other.group().lower()
        and _FAMILY_OF[one.group().lower()] == _FAMILY_OF[other.group().lower()]
        and not _LISTED.fullmatch(caption[one.end() : other.start()])
    ]
    if not pairs:
        return None
    one, other = draw.choice(pairs)
    return _with_words(caption, [(one, other.group()), (other, one.group())])


def _with_words(caption: str, changes: list[tuple[re.Match[str], str]]) -> str:
    for mention, word in reversed(changes):  # from the end, so that earlier offsets stay valid
        word = word.capitalize() if mention.group()[0].isupper() else word.lower()
        caption = caption[: mention.start()] + word + caption[mention.end() :]
    return caption


_KINDS: dict[str, Callable[[str, list[re.Match[str]], random.Random], str | None]] = {
    "replaced": _replaced,
    "exchanged": _exchanged,
}
KINDS: tuple[str, ...] = tuple(_KINDS)
"""Kinds of hard negatives."""
