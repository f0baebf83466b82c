"""Checks of generated summaries against their captions; they need no model.

A language model that is asked for a summary sometimes repeats the caption, talks about its task, or mentions things
that are not in the caption. Such a text would teach the image tower something false.
"""

import re
from collections import Counter
from typing import Literal

from longclip.constants import CLIP_CONTEXT_LENGTH
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
"""Words about the image as such; a summary may use them even if the caption does not."""

_IRREGULAR = {"children": "child", "feet": "foot", "men": "man", "people": "person", "women": "woman"}


def clean_summary(text: str) -> str:
    """A model's answer without what is not part of the summary: extra space, thoughts, a label, surrounding quotes."""
    summary = " ".join(_THOUGHTS.sub(" ", text).split())
    while True:
        bare = _LABEL.sub("", summary)
        for opening, closing in _QUOTES:
            inner = bare[len(opening) : -len(closing)].strip()
            quoted = bare.startswith(opening) and bare.endswith(closing) and inner
            # Two quotations, or an apostrophe between single quotes, do not quote the whole text.
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
    max_tokens: int = CLIP_CONTEXT_LENGTH,
    min_words: int = 3,
    max_copied: float = 0.9,
    max_unsupported: float = 0.2,
) -> Problem | None:
    """The first reason to reject a summary of a caption, or None.

    Args:
        summary: cleaned text.
        caption: what it summarizes.
        tokens: CLIP tokens of the summary, start and end included.
        max_tokens: a longer summary is `too_long`.
        min_words: a summary of fewer words is `too_short`, unless it has as many as its caption.
        max_copied: a summary with at least this share of the words of a caption of several sentences is a `copy`.
        max_unsupported: a summary with a larger share of content words that its caption lacks is `ungrounded`.
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
    """Share of the summary's distinct content words that the caption has in no form; 0 if it has no content words."""
    stems = _stems(summary) - {stem(word) for word in _FRAMING}
    return len(stems - _stems(caption)) / len(stems) if stems else 0.0


def stem(word: str) -> str:
    """The stem of a lower-case English word, roughly: without plural, -ing and -ed endings.

    Stems are only compared with each other and need not be words: `dishes` and `dish` are both `dish`, `riding` and
    `ride` are both `rid`.
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
