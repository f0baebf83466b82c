"""Hard negatives in the late part of a caption: an attribute that is wrong, where a model of 77 tokens cannot see it.

A model that only collects words finds an image by its late words, and still does not know which thing is red and which
is blue. So two kinds of wrong captions are made, after SugarCrepe (arXiv 2306.14610) and ARO (arXiv 2210.01936):
`replaced` puts another word of the same family in a word's place, `exchanged` lets two words of a family change places,
which leaves the words of the caption the same.
"""

import random
import re
from collections.abc import Callable
from itertools import combinations

from transformers import CLIPTokenizer

from longclip.text.sentences import drawn_by

FROM_TOKEN, TO_TOKEN = 77, 248
"""Attributes are changed behind what CLIP reads, and within what Long-CLIP reads; start and end token included."""

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
"""Words that may stand in each other's place. Left out is what needs another grammar ("one", "orange")."""

_FAMILY_OF = {word: family for family, members in FAMILIES.items() for word in members}
# "Right below it" and "wearing a top" are no places: words with other meanings count behind certain words only.
_PLACED = "|".join(
    rf"(?<=\b{before} )" for before in ("the", "top", "bottom", "upper", "lower", "far", "its", "their", "your")
)
_AMBIGUOUS = ("right", "left", "top", "bottom")
_WORDS = "|".join(word for word in _FAMILY_OF if word not in _AMBIGUOUS)
_MENTION = re.compile(rf"\b(?:{_WORDS}|(?:{_PLACED})(?:{'|'.join(_AMBIGUOUS)}))\b", re.IGNORECASE)
_LISTED = re.compile(r"[\s,/-]*(?:\b(?:and|or)\b[\s,]*)?(?:\b(?:the|an?)\b\s*)?", re.IGNORECASE)
"""Between words that are listed: in "on the left and the right" they may change places, and nothing is wrong."""


def hard_negative(kind: str, caption: str, key: str, tokenizer: CLIPTokenizer) -> str | None:
    """A caption with wrong attributes behind token 77, drawn by the key.

    Args:
        kind: one of `KINDS`.
        caption: the right one.
        key: the same key gives the same result.
        tokenizer: a CLIP tokenizer.

    Returns:
        None where there is no such attribute.

    Raises:
        KeyError: there is no such kind.
    """
    make = _KINDS[kind]
    start, end = late_part(caption, tokenizer)
    mentions = [found for found in _MENTION.finditer(caption) if start <= found.start() and found.end() <= end]
    return make(caption, mentions, drawn_by(caption, key))


def late_part(caption: str, tokenizer: CLIPTokenizer) -> tuple[int, int]:
    """First character that a model of 77 tokens does not read, and the end of what one of 248 tokens does."""
    offsets = tokenizer.backend_tokenizer.encode(caption).offsets

    def cut(tokens: int) -> int:
        # The end token takes the last place: of 77 tokens the first 76 are read.
        return offsets[tokens - 1][0] if len(offsets) > tokens else len(caption)

    return cut(FROM_TOKEN), cut(TO_TOKEN)


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
    for mention, word in reversed(changes):  # from behind, so that places stay right
        word = word.capitalize() if mention.group()[0].isupper() else word.lower()
        caption = caption[: mention.start()] + word + caption[mention.end() :]
    return caption


_KINDS: dict[str, Callable[[str, list[re.Match[str]], random.Random], str | None]] = {
    "replaced": _replaced,
    "exchanged": _exchanged,
}
KINDS: tuple[str, ...] = tuple(_KINDS)
"""Kinds of hard negatives."""
