"""Sentences and words of a caption."""

import re
from collections.abc import Sequence
from itertools import pairwise

from longclip.text.boundaries import boundaries
from longclip.text.word_lists import word_set

_ENDED = re.compile(r"[.!?][\"')\]]*$")
_FIRST_LETTER = re.compile(r"[^\W_]")
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_STOP_WORDS = word_set(
    "a an and are as at be been being but by for from had has have he her his i in into is it its of on one or over she"
    " some than that the their them there these they this those to two under was were which while who with"
)


def caption_text(cell: str | Sequence[str | None] | None) -> str:
    """The text of a row's caption cell.

    Several captions of one image become one paragraph in which each caption is a sentence, so that every summary
    strategy works on them: the most central sentence is then the most central caption.

    Args:
        cell: one caption, which is returned unchanged; several; or none, which gives "".
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    captions = [tidy(caption) for caption in cell if caption]
    captions = [caption for caption in captions if caption]
    return captions[0] if len(captions) == 1 else " ".join(map(_as_sentence, captions))


def _as_sentence(caption: str) -> str:
    """The caption as one sentence for `split_sentences`: starts with a capital and ends with a full stop."""
    caption = _FIRST_LETTER.sub(lambda letter: letter.group().upper(), caption, count=1)
    return caption if _ENDED.search(caption) else f"{caption.rstrip(',;:')}."


def split_sentences(caption: str) -> list[str]:
    """A caption cut into its sentences, each with the white space around it: joined, they are the caption."""
    places = [0, *boundaries(caption), len(caption)]
    return [caption[start:end] for start, end in pairwise(places)] if caption else []


def tidy(text: str) -> str:
    """The text with single spaces between its words, and none around it."""
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return _WORD.findall(text.lower())


def content_words(text: str) -> list[str]:
    """Lower-case words of a text without the function words."""
    return [word for word in words(text) if word not in _STOP_WORDS]
