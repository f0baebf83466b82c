"""Where the sentences of a caption end.

Captions quote signs, count, abbreviate, and forget spaces and capitals. A quotation or bracket is never divided, even
if it contains full stops ('a sign that reads "NO. / RUNNING! / Please."').
"""

import re

from longclip.text.word_lists import ABBREVIATIONS, BEFORE_NUMBER, FIRST_WORDS, TITLES, UNFINISHED, UNITS

_QUOTATION = re.compile(
    # An inch mark (5") does not open a quotation. A straight mark after a space and before a letter opens another one.
    r"""(?<!\w)"[^"\n]{0,300}(?:(?<!\s)"|"(?!\w))"""
    r"""|(?<!\w)'(?=\w)[^'"\n]{0,100}(?<=\S)'(?!\w)"""
    r"""|“[^“”\n]{0,300}”|«[^«»\n]{0,300}»|「[^「」\n]{0,300}」|『[^『』\n]{0,300}』"""
    r"""|\([^()\n]{0,300}\)|\[[^\[\]\n]{0,300}\]|（[^（）\n]{0,300}）"""
)
_END = re.compile(r"[.!?…؟۔]+|[。！？｡।॥።။។]+|(?<![^\S\n])[^\S\n]*\n\s*")
_ENDED = re.compile(r"[.!?…؟۔。！？।॥:;：；][\"'”’)\]»」』）]*$")
_WIDE = "。！？｡"
"""Chinese and Japanese full stops: no space follows them."""
_CLOSING = "\"'”’)]»」』）"
_OPENING = "\"'“‘([«「『（¿¡"
_BULLET = re.compile(r"(?:[-*+•–—·]|\(?(?:\d{1,3}|[a-zA-Z])[.)])\s+\S")
_ITEM = re.compile(
    r"(?:(?P<first>^|[\n.!?:;,]\s{0,60})|\s)(?P<mark>\(?(?:(?P<number>\d{1,2})[.)]|(?P<letter>[a-z])\)))\s+[^\W\d]"
)
_ITEM_MARK = re.compile(r"\d{1,3}|[IVX]+|[a-zA-Z]")
_NEXT_WORD = re.compile(r"[^\W_]+(?:['’]s)?(?![.\w])")
_WORD = re.compile(r"[^\W\d_]{2,}[a-z]")
_GLUED = re.compile(r"[A-Z][a-z]*[\s,]")
"""The first word of a sentence that follows without a space: not that of a name such as Node.JS or R.C.LUME."""
_FEW_DIGITS = re.compile(r"(?:^|\D)\d{1,3}$")
_NUMBER_BEFORE = re.compile(r"\d[\s-]*$")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}|[^\W\d_]")
"""Initials, a.m., U.S., e.g., Ph.D."""

_NEAR = 60
"""Characters before a mark that are looked at: no more, so that the time is linear in the length of any text."""


def quotations(text: str) -> list[tuple[int, int]]:
    """Start and end, in characters, of each quotation and bracket; those that are not closed are left out."""
    return [match.span() for match in _QUOTATION.finditer(text)]


def boundaries(caption: str) -> list[int]:
    """Places (characters, ascending) at which a sentence ends and another one starts, after the space between them."""
    quoted = quotations(caption)
    opened = {start for start, _ in quoted}
    items = _list_items(caption)
    places = set(items)
    start = following = 0  # of the sentence; number of the first quotation that ends after the mark
    for mark in _END.finditer(caption):
        end = mark.end()
        while following < len(quoted) and quoted[following][1] <= mark.start():
            following += 1
        if following < len(quoted) and quoted[following][0] < mark.start():
            quotation_end = quoted[following][1]
            if caption[end : quotation_end - 1].strip():
                continue  # in the middle of a quotation
            end = quotation_end
        while end < len(caption) and caption[end] in _CLOSING and end not in opened:
            end += 1
        place = _skip_space(caption, end)
        if place == len(caption):
            break
        word = _word_before(caption, mark.start())
        word_start = mark.start() - len(word)
        marks_item = _ITEM_MARK.fullmatch(word) and (
            word_start in items or not caption[start:word_start][:9].strip(" (")
        )
        if place in items or (not marks_item and _ends(caption, mark, word, end, place, place in opened)):
            places.add(place)
            start = place
    return sorted(places)


def _ends(caption: str, mark: re.Match[str], word: str, end: int, place: int, opens: bool) -> bool:
    """Whether a sentence ends with a mark.

    Args:
        caption: the whole text.
        mark: a full stop or other marks, or the end of a line.
        word: the word before the mark.
        end: where its closing quotes and brackets end.
        place: where the space after them ends.
        opens: whether a quotation or bracket opens there.
    """
    first = _first_letter(caption, place)
    if not mark.group().strip():
        return _line_ends(caption, mark.start(), place)
    if mark.group()[0] in _WIDE:  # hiragana after a closing bracket is a particle: the quotation is part of a sentence
        return caption[place] not in "，、；：,;:" and not (end > mark.end() and "ぁ" <= first <= "ん")
    if end == place:  # no space between them
        return opens or bool(_GLUED.match(caption, place) and _WORD.fullmatch(word))
    if "\n" in caption[end:place] and _line_ends(caption, end, place):
        return True
    if not (first.isalnum() or caption[place] in "#$@&€£+*•"):
        return False
    if first.islower() and (end > mark.end() or mark.group().startswith(("..", "…"))):
        return False  # a quoted exclamation, or an ellipsis, in the middle of a sentence
    return mark.group() != "." or not _abbreviates(word, caption, mark.start(), place, first)


def _abbreviates(word: str, caption: str, dot: int, place: int, first: str) -> bool:
    """Whether the full stop at `dot` belongs to the word or number before it and does not end a sentence."""
    lower = word.lower()
    if first.isdigit() and (lower in BEFORE_NUMBER or _FEW_DIGITS.search(word)):
        return True
    next_word = _NEXT_WORD.match(caption, place)
    starts_sentence = first.isupper() and next_word is not None and next_word.group().lower() in FIRST_WORDS
    if _DOTTED.fullmatch(word) or word in TITLES:
        return not starts_sentence
    if lower in UNITS:
        return first.islower() and _NUMBER_BEFORE.search(caption[max(0, dot - _NEAR) : dot - len(word)]) is not None
    return lower in ABBREVIATIONS and not starts_sentence and not (lower == "no" and first.isalpha())


def _line_ends(caption: str, end: int, place: int) -> bool:
    """Whether a sentence ends with the line that ends here; the next one starts at `place`."""
    line = caption[max(0, end - _NEAR) : end].rstrip()
    if not line:
        return False
    if _ENDED.search(line) or _BULLET.match(caption, place):
        return True
    unfinished = line[-1] in ",，、-–—&/" or line.endswith(("'s", "’s")) or _word_before(line, len(line)) in UNFINISHED
    return not unfinished and not _first_letter(caption, place).islower()


def _list_items(caption: str) -> set[int]:
    """Places of the marks of a list, "1." "2." ... or "a)" "b)" ...; its numbers or letters must follow each other."""
    items: list[int] = []
    for match in _ITEM.finditer(caption):
        number = int(match["number"]) if match["number"] else ord(match["letter"]) - ord("a") + 1
        if number == len(items) + 1 and (number > 1 or match["first"] is not None):
            items.append(match.start("mark"))
    return {place for place in items if place} if len(items) > 1 else set()


def _word_before(text: str, end: int) -> str:
    """The word that ends at a place, without what opens it."""
    start = end
    while start and end - start < _NEAR and not (text[start - 1].isspace() or text[start - 1] in _OPENING + "/,:"):
        start -= 1
    return text[start:end]


def _first_letter(text: str, place: int) -> str:
    """The first character of a word, after what opens it."""
    while place < len(text) and text[place] in _OPENING:
        place += 1
    return text[place : place + 1]


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
