"""A text cut to what a plain CLIP reads, without half a word or an open quotation."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from longclip.constants import CLIP_CONTEXT_LENGTH, LONG_CLIP_CONTEXT_LENGTH
from longclip.text.boundaries import quotations

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_CLAUSE_END = re.compile(r"[.!?,;:…](?=\s)|\s[–—-](?=\s)|—|[，、；：。！？؟،؛।]")
_WORD_END = re.compile(r"(?=\s)|(?<=[\u2e80-\u9fff\uac00-\ud7af\u0e00-\u0e7f])")
"""Before a space, and after a letter of a script that sets none between words."""
_LOOSE_END = re.compile(
    r"(?:[\s,;:–—(，、；：-]+|\s(?:a|an|the|and|or|but|of|in|on|at|to|by|for|from|with|which|that|who|where|while|as|is|are"
    r"|its|their|his|her))+$",
    re.IGNORECASE,
)


def shortened(text: str) -> str:
    """The start of a text that fits into CLIP's 77 tokens; a text that fits is returned unchanged.

    It ends at the end of a clause if there is one in the second half of what fits, else at the end of a word. Only a
    first word of more than 77 tokens is returned whole.
    """
    if len(text) < CLIP_CONTEXT_LENGTH // 4 or sum(map(_token_count, text.split())) <= CLIP_CONTEXT_LENGTH - 2:
        return text
    offsets = _tokenizer().backend_tokenizer.encode(text).offsets
    room = offsets[CLIP_CONTEXT_LENGTH - 1][0]
    quoted = quotations(text)
    outside = [place for place in range(room + 1) if not any(start < place < end for start, end in quoted)]
    clause_ends = {match.end() for match in _CLAUSE_END.finditer(text, 0, room)}
    word_ends = {match.start() for match in _WORD_END.finditer(text, 1, room + 1)}
    for places in (
        [place for place in outside if place in clause_ends and 2 * place >= room],
        [place for place in outside if place in word_ends and 2 * place >= room],
        sorted(word_ends),
    ):
        if places:
            return _LOOSE_END.sub("", text[: places[-1]]) or text[: places[-1]]
    return text.split(maxsplit=1)[0]


@lru_cache(maxsize=2**16)
def _token_count(word: str) -> int:
    """Number of tokens of a word, without start and end token. Words repeat, and white space has no tokens."""
    return len(_tokenizer().backend_tokenizer.encode(word, add_special_tokens=False))


def _tokenizer() -> "CLIPTokenizer":
    from longclip.tokenizer import load_tokenizer  # transformers takes seconds to import: only where it is needed

    return load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH)
