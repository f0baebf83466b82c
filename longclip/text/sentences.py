"""Sentences and words of a caption."""

import re
from collections.abc import Sequence

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
    """The text of a row's caption cell.

    Several captions of one image become one paragraph in which each caption is a sentence, so that every summary
    strategy works on them: the most central sentence is then the most central caption.

    Args:
        cell: one caption, which is returned unchanged; several; or none, which gives "".
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    captions = [" ".join(caption.split()) for caption in cell if caption]
    captions = [caption for caption in captions if caption]
    return captions[0] if len(captions) == 1 else " ".join(map(_as_sentence, captions))


def _as_sentence(caption: str) -> str:
    """The caption as one sentence for `split_sentences`: starts with a capital and ends with a full stop."""
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
