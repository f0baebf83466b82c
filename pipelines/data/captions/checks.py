"""Checks of a model's reply: whether it is a caption, and if not, what is wrong with it. They need no model."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.text.sentences import split_sentences
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.data.captions.languages import is_in_language
from pipelines.data.captions.settings import Checks

Problem = Literal[
    "empty", "not_text", "refusal", "markup", "repetition", "language", "cut_off", "too_long", "too_short"
]
REFUSED = ("refusal", "content_filter")
"""Reasons to stop with which a server says that the model refused."""

_THOUGHTS = re.compile(
    r"<(think|thinking|thought|reasoning|seed:think)>.*?(</\1>|\Z)|\[THINK\].*?(\[/THINK\]|\Z)|◁think▷.*?(◁/think▷|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_END_OF_THOUGHTS = re.compile(r"</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|◁/think▷", re.IGNORECASE)
_ANSWER = re.compile(r"^<(answer|caption|description)>(.*)</\1>$", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:image|eos|bos|pad|unk|end_of_turn|start_of_turn)>|\[/?INST\]")
_SENTENCE_OF_ASSENT = r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great)(?: thing)?[!,.]\s*)?"
_SUBJECT = r"(?:image|picture|photo|photograph|scene|description|caption|paragraph)"
_INTRODUCTION = re.compile(
    rf"^{_SENTENCE_OF_ASSENT}(?:here(?:'s| is| are)|below is|this is|the following is)\b[^.!?\n]{{0,120}}"
    rf"\b{_SUBJECT}\b[^.!?\n]{{0,80}}:\s+",
    re.IGNORECASE,
)
_ASSENT = re.compile(r"^(?:sure|certainly|of course|absolutely)(?: thing)?[!,.]\s+(?=[A-Z])", re.IGNORECASE)
_LABEL = re.compile(
    r"^(?:(?:the|a|image|long|detailed|new|revised|shorter|expanded) ){0,3}(?:caption|description|answer|paragraph)"
    r"(?: of the (?:image|picture|photo))?\s*:\s+",
    re.IGNORECASE,
)
_OFFER = re.compile(
    r"(?<!\s)\s+(?:let me know if|please let me know|feel free to|i hope (?:this|that)|would you like|do you want me|"
    r"if you (?:need|want|would like|have any)|is there anything)\b[^.!?]*[.!?]*$",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(\*\*|__|\*|`)(?=\S)([^*_`\n]+?)(?<=\S)\1")
_BULLET = re.compile(r"^\s*(?:[-*+•◦▪‣–—]|\(?\d{1,2}[.)]|\(?[a-z][)])\s+\S", re.MULTILINE)
_HEADING = re.compile(r"^\s*(?:#{1,6}\s+\S.*|[*_]{2}[^*_\n]+[*_]{2}:?|[A-Z][^.!?\n]{0,60}:)\s*$", re.MULTILINE)
_INLINE_MARKS = [re.compile(rf"(?:^|\s)\(?{number}[.)]\s+") for number in (1, 2, 3)]
_TABLE = re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE)
_TAG = re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>\n]*)?/?>", re.IGNORECASE)
_LINK = re.compile(r"!?\[[^\]\n]*\]\([^)\n]+\)|https?://\S+")
_QUOTED = re.compile("\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|'[A-Z][^'\n]*'")
_QUOTES = (('"', '"'), ("\u201c", "\u201d"), ("\u00ab", "\u00bb"))
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|assistant|vision model)\b"
    r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model|text-based)\b"
    r"|\bi(?:'m| am)(?: (?:really|very|so|truly))? (?:sorry|afraid|unable|not able|not allowed|not permitted)\b"
    r"|\bi (?:can(?:no|')t|can not|could(?: not|n't)|will not|won't|must decline|apologi[sz]e|regret)\b"
    r"|\bi do(?: not|n't) (?:have|know|recogni[sz]e|identify|feel comfortable"
    r"|see (?:an?|any|the) (?:image|picture|photo))"
    r"|^(?:sorry|apologies|unfortunately|my apologies)\b"
    r"|\b(?:no|not any|isn't any|is not any) (?:image|picture|photo)(?: \w+)? (?:was |is |has been )?"
    r"(?:attached|provided|uploaded|visible|available|included|supplied)\b"
    r"|\bplease (?:upload|provide|attach|share|send|supply)\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:content |usage |safety )?(?:policy|policies|guidelines)\b",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd\ufffe\uffff]")
_ENDED = re.compile("[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019\u00bb)\\]]*$")
_PHRASE_LOOP = re.compile(r"\b(\w+(?:\W+\w+){0,11})(?:\W+\1\b){3,}", re.IGNORECASE)
_CHARACTER_LOOP = re.compile(r"(\S{1,12}?)\1{15,}")
MAX_CHARACTERS = 8000
"""Of a reply without its thoughts: several times a long caption. The rest counts as cut off."""

LOOP_WORDS, MAX_LOOPED = 4, 0.25
MIN_SENTENCE_WORDS = 4


@dataclass(frozen=True)
class Verdict:
    """What the checks say of a reply."""

    caption: str
    """The reply without what is not part of the caption, cut at a sentence if it was a little too long."""
    tokens: int
    """Its CLIP tokens, start and end token included."""
    problem: Problem | None
    cut: bool = False
    """Whether sentences were removed."""


def judge(text: str, finish_reason: str | None, checks: Checks, last: bool) -> Verdict:
    """Clean and check a reply.

    Args:
        text: what the model wrote.
        finish_reason: why it stopped, as chat completions say it.
        checks: length and language.
        last: whether the model will not be asked again: then a caption that is too long is cut.
    """
    unclean = _CONTROL.search(text)
    text = _answer(text)
    if len(text) > MAX_CHARACTERS:
        text, finish_reason = text[:MAX_CHARACTERS], finish_reason if finish_reason in REFUSED else "length"
    caption = clean_caption(text)
    problem = "not_text" if unclean else _problem(text, caption, finish_reason, checks)
    tokens = _tokens(caption) if problem is None else 0
    if problem:
        return Verdict(caption, tokens, problem)
    # A server that does not say why the model stopped may have cut it off.
    ended = finish_reason == "stop" or (finish_reason != "length" and _ENDED.search(caption) is not None)
    if ended and tokens <= checks.max_tokens:
        return Verdict(caption, tokens, "too_short" if tokens < checks.min_tokens else None)
    problem = "too_long" if tokens > checks.max_tokens else "cut_off"
    if last or (ended and tokens <= LONG_CLIP_CONTEXT_LENGTH):
        shorter, count = cut_at_sentence(caption, checks.max_tokens, ended)
        if count >= checks.min_tokens:
            return Verdict(shorter, count, None, cut=True)
    return Verdict(caption, tokens, problem)


def clean_caption(text: str) -> str:
    """A reply as one paragraph, without thoughts, special tokens, an introduction, a label, quotes, emphasis and an
    offer of further help."""
    caption = _answer(text)
    while True:
        bare = _EMPHASIS.sub(r"\2", caption)
        for part in (_INTRODUCTION, _ASSENT, _LABEL):
            bare = part.sub("", bare, count=1)
        bare = _OFFER.sub("", bare)
        for opening, closing in _QUOTES:
            inner = bare[1:-1]
            if bare.startswith(opening) and bare.endswith(closing) and opening not in inner and closing not in inner:
                bare = inner.strip()
        if bare == caption:
            return " ".join(caption.split())
        caption = bare


def _answer(text: str) -> str:
    """A reply without thoughts, special tokens, and the tags or fence around it."""
    text = _THOUGHTS.sub(" ", text)
    # Where the prompt of the server opens the thoughts, the reply only has their end.
    text = text[max((end.end() for end in _END_OF_THOUGHTS.finditer(text)), default=0) :]
    text = _SPECIAL.sub(" ", text).strip()
    for around, group in ((_ANSWER, 2), (_FENCE, 1)):
        if match := around.match(text):
            text = match[group].strip()
    return text


def cut_at_sentence(caption: str, max_tokens: int, ended: bool) -> tuple[str, int]:
    """The longest run of whole sentences from the start with at most `max_tokens` tokens, and its tokens; "" and 0 if
    there is none. The last sentence of a caption that has not `ended` is not whole."""
    sentences = [" ".join(sentence.split()) for sentence in split_sentences(caption)]
    for count in range(len(sentences) - (not ended and not _ENDED.search(caption)), 0, -1):
        shorter = " ".join(sentences[:count])
        tokens = _tokens(shorter)
        if tokens <= max_tokens:
            return shorter, tokens
    return "", 0


def _problem(text: str, caption: str, finish_reason: str | None, checks: Checks) -> Problem | None:
    """The first problem that makes a reply useless, whatever its length."""
    if finish_reason in REFUSED or is_refusal(caption):
        return "refusal"
    if not any(character.isalnum() for character in caption):
        return "empty"
    if has_markup(text):
        return "markup"
    if repeats_itself(caption):
        return "repetition"
    return None if is_in_language(caption, checks.language) else "language"


def is_refusal(caption: str) -> bool:
    """Whether the model talks about itself or asks for an image instead of describing one; quotations do not count."""
    return _REFUSAL.search(_QUOTED.sub(" ", caption.replace("\u2019", "'"))) is not None


def has_markup(text: str) -> bool:
    """Whether a reply has a list, headings, a table, HTML, a link, or is JSON."""
    text = _answer(text)
    if text.startswith(("{", "[")):
        try:
            json.loads(text)
            return True
        except (ValueError, RecursionError):
            pass
    body = _INTRODUCTION.sub("", text, count=1)
    headings = [line for line in _HEADING.findall(body) if not _INTRODUCTION.match(f"{line.strip()} ")]
    markup = (_TABLE.search(body), _TAG.search(body), _LINK.search(body), _has_inline_list(body))
    return len(_BULLET.findall(body)) > 1 or bool(headings) or any(markup)


def _has_inline_list(text: str) -> bool:
    """Whether a text has "1. ... 2. ... 3. ..."."""
    place = 0
    for mark in _INLINE_MARKS:
        match = mark.search(text, place)
        if match is None:
            return False
        place = match.end()
    return True


def repeats_itself(caption: str) -> bool:
    """Whether a caption is caught in a loop: a phrase four times in a row, a sentence three times, or many repeated
    phrases."""
    if _PHRASE_LOOP.search(caption) or _CHARACTER_LOOP.search(caption):
        return True
    words = caption.casefold().split()
    sentences = Counter(sentence.casefold().strip() for sentence in split_sentences(caption))
    if any(count > 2 and len(sentence.split()) >= MIN_SENTENCE_WORDS for sentence, count in sentences.items()):
        return True
    runs = Counter(zip(*(words[start:] for start in range(LOOP_WORDS)), strict=False))
    return sum(count - 1 for count in runs.values()) > MAX_LOOPED * max(1, runs.total())


def _tokens(caption: str) -> int:
    return count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), [caption])[0]
