"""What is wrong with a summary that a model wrote: checks against its caption that need no model.

A language model that is asked for a summary sometimes repeats the caption, talks about its task, or tells of things
that the caption does not. Such a text would teach the image tower something false.
"""

import re
from collections import Counter
from typing import Literal

from longclip.text.sentences import content_words, split_sentences, words

Problem = Literal["empty", "too_short", "too_long", "copy", "ungrounded"]

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_LABEL = re.compile(r"^[*_#\s]*(?:(?:brief|concise|one[- ]sentence|short) )?summary[*_]*:[*_]*\s*", re.IGNORECASE)
_QUOTES = (
    ('"', '"'),
    ("'", "'"),
    ("\u201c", "\u201d"),
    ("\u2018", "\u2019"),
    ("\u00ab", "\u00bb"),
    ("`", "`"),
    ("**", "**"),
)
_FRAMING = frozenset(
    [
        "depict",
        "depicted",
        "depicting",
        "depicts",
        "feature",
        "featured",
        "features",
        "featuring",
        "image",
        "images",
        "photo",
        "photograph",
        "photographs",
        "photos",
        "picture",
        "pictured",
        "pictures",
        "scene",
        "scenes",
        "show",
        "showing",
        "shown",
        "shows",
    ]
)
"""Words about the image as such; a summary may use them whether the caption does or not."""

_IRREGULAR = {"children": "child", "feet": "foot", "men": "man", "people": "person", "women": "woman"}


def clean_summary(text: str) -> str:
    """A model's answer without what is no part of the summary: extra space, thoughts, a label, quotes around it."""
    summary = " ".join(_THOUGHTS.sub(" ", text).split())
    while True:
        bare = _LABEL.sub("", summary)
        for opening, closing in _QUOTES:
            inner = bare[len(opening) : -len(closing)].strip()
            quoted = bare.startswith(opening) and bare.endswith(closing) and inner
            # Two quotations, or an apostrophe between single quotes, are no quotes around the whole.
            if quoted and opening not in inner and closing not in inner:
                bare = inner
        if bare == summary:
            return summary
        summary = bare


def summary_problem(
    summary: str,
    caption: str,
    tokens: int,
    *,
    max_tokens: int = 77,
    min_words: int = 3,
    max_copied: float = 0.9,
    max_unsupported: float = 0.2,
) -> Problem | None:
    """The first reason for which a summary cannot stand for its caption, or None.

    Args:
        summary: cleaned text.
        caption: what it summarizes.
        tokens: CLIP tokens of the summary, start and end included.
        max_tokens: above it, the summary is `too_long`.
        min_words: below it, `too_short`; a caption that has fewer words itself asks for no more than it has.
        max_copied: share of the words of a caption of several sentences; from it on, the summary is a `copy`.
        max_unsupported: share of the summary's content words that the caption lacks; above it, it is `ungrounded`.
    """
    summary_words, caption_words = words(summary), words(caption)
    if not summary_words:
        return "empty"
    if len(summary_words) < min(min_words, len(caption_words)):
        return "too_short"
    if tokens > max_tokens:
        return "too_long"
    copied = (Counter(summary_words) & Counter(caption_words)).total()
    if copied >= max_copied * len(caption_words) and len(split_sentences(caption)) > 1:
        return "copy"
    return "ungrounded" if unsupported(summary, caption) > max_unsupported else None


def unsupported(summary: str, caption: str) -> float:
    """Share of the summary's different content words that the caption has in no form; 0 where it has no such words."""
    own = _stems(summary) - {stem(word) for word in _FRAMING}
    return len(own - _stems(caption)) / len(own) if own else 0.0


def stem(word: str) -> str:
    """What the forms of a lower-case English word share, roughly: without plural, -ing, -ed and what they change.

    Two words are only ever compared with each other, so a stem need not be a word: `dishes` and `dish` are both `dish`,
    `riding` and `ride` are both `rid`.
    """
    word = _IRREGULAR.get(word, word.removesuffix("'s"))
    if word.endswith("ies") and len(word) > 4:
        word = f"{word[:-3]}y"
    elif word.endswith(("ches", "shes", "sses", "xes", "zes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us")) and len(word) > 3:
        word = word[:-1]
    for ending in ("ing", "ed"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) > 2 and re.search("[aeiouy]", rest):
            word = rest
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    word = word.removesuffix("e")
    return f"{word[:-1]}i" if word.endswith("y") else word


def _stems(text: str) -> set[str]:
    return {stem(part) for word in content_words(text) for part in word.split("-")}
