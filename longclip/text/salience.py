"""Which sentence of a caption says what the picture is of.

Long captions begin with their gist and continue with details, so the first sentence has an advantage. It loses it if
it only speaks of the weather or of an edge of the picture; then a sentence wins that speaks of the picture as a whole,
introduces something, or has the words that the caption repeats.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from longclip.text.sentences import content_words
from longclip.text.word_lists import word_set

_PICTURE = (
    r"(?:image|photo|photograph|picture|scene|shot|view|close-?up|screenshot|painting|drawing|mural|portrait"
    r"|illustration|selfie|panorama|snapshot)"
)
_EDGE = r"(?:background|distance|left|right|top|bottom|sides?|corners?|edges?|front|back|rear)"
_SIDE = rf"(?:the|each|either|both|its|one|far|very|upper|lower|other|near|immediate|{_EDGE})"

_WHOLE = re.compile(
    rf"(?:in )?(?:this|the) {_PICTURE},? (?:(?:we|you) (?:can )?see|there (?:is|are)|(?:is|was) (?:of|an?)"
    r"|shows?|depicts?|captures?|features?|showcases?|portrays?|presents?|appears to be)\b"
    r"|(?:this|it|here) (?:is|shows|depicts|looks like|appears to be)\b"
    rf"|.*\b{_PICTURE} (?:of|shows|captures) (?!the image|the frame)"
    r"|.*\b(?:main|central|primary) (?:focus|subject)\b|.*\bfoc(?:us|al point) of the\b",
    re.IGNORECASE,
)
"""Speaks of the picture as such, and says what it shows."""

_INTRODUCTION = re.compile(
    r"(?:an?|this|one|two|three|four|five|several|many|multiple|people"
    r"|there (?:is|are|appears to be) (?:an?|one|two|three|four|several|many))\b",
    re.IGNORECASE,
)

_PLACE = re.compile(
    r"(?:(?:and|also|further|farther|just|directly|immediately|slightly|partially) )*(?:"
    rf"(?:in|on|at|to|from|towards?|along|near|around) (?:{_SIDE} )*{_EDGE}\b"
    rf"(?P<of_picture>(?:[- ]hand)?(?:,| of (?:the|this) {_PICTURE}| there\b| (?:is|are|a|an)\b))?"
    r"|(?:behind|above|below|beneath|under|underneath|beside|besides|next|beyond|inside|surrounding|over|across|between"
    r"|through|around|along|atop|attached|hanging|adjacent|overhead|nearby|sitting|standing) )",
    re.IGNORECASE,
)
"""Starts with a place: an edge of the picture, or next to something that an earlier sentence introduced."""

_REFERENCE = re.compile(
    r"(?:(?:and|but|also|additionally|moreover|furthermore|however|while|with|overall),? )*"
    r"(?:it|it's|its|they|their|he|his|she|her|these|those|them|each|both|all|another|other|others|some|most|more"
    r"|one of|everything else|parts?|portions?|half"
    r"|the (?:rest|other|second|third|fourth|last|next|remaining))\b",
    re.IGNORECASE,
)
"""Starts with something that an earlier sentence introduced, or a part of it."""

_SURROUNDINGS = re.compile(
    r"(?:(?:it'?s?|it is|the|this|an?|there is|there are|some|few|and|very|bit|of|clear|cloudy|bright|blue|light|dark"
    r"|gr[ea]y|overcast|pale|white|whole|natural|general|overall|cloudless|visible|day|sunny|cold|warm|hot|cool|calm|nice"
    r"|snowy|rainy|windy|foggy|late|early|beautiful|vibrant|mostly|partially|partly|but|out|outside|outdoors?|indoors?)"
    r"\b[\s,.]*)*"
    r"(?P<what>sky|skies|clouds?|sun|sunlight|weather|lighting|shadows?|atmosphere|background|ground|floor|day"
    r"|daytime|night|nighttime|daylight|reflections?|grass|ceiling|text|words?|letters?|outdoors|indoors|outside)\b"
    r"(?! (?:shot|view|level))",
    re.IGNORECASE,
)
"""Starts with the weather, the light, the ground, or a text in the picture."""
_WHEN = word_set("day daytime night nighttime daylight outdoors indoors outside")
_WEATHER = _WHEN | word_set(
    "sky skies cloud clouds cloudy sun sunny sunlight shining bright clear blue gray grey white dark light lit"
    " completely cloudless overcast very out time image no not nothing also here thick thin full covered covering lots"
    " little harsh"
)
_SUBJECTS = word_set("background floor grass ground letter letters text word words")
"""May be what the picture is of, if the caption starts with them."""

_LOCATIONS = word_set(
    "image photo picture view shot scene frame side left right top bottom corner background foreground front back"
    " middle center upper lower far visible seen"
)
"""Words that say where something is: they do not make a sentence central."""
_MOST_ADDED = 0.45


def most_salient(sentences: Sequence[str]) -> str:
    """The sentence that best says what the picture is of; the first of equal ones. There must be at least one."""
    contents = [[word for word in content_words(sentence) if word not in _LOCATIONS] for sentence in sentences]
    whole = Counter(chain.from_iterable(contents))
    length = math.hypot(*whole.values()) or 1.0
    best, best_score = sentences[0], -math.inf
    for index, (sentence, content) in enumerate(zip(sentences, contents, strict=True)):
        counts = Counter(content)
        score = 1.0 / (1 + index)
        if counts:  # the similarity (cosine) of its words with the whole caption's
            score += sum(count * whole[word] for word, count in counts.items()) / (
                math.hypot(*counts.values()) * length
            )
        if score + _MOST_ADDED <= best_score:
            continue
        score += _form(sentence, index) - 0.1 * max(0, 4 - len(counts))
        if score > best_score:
            best, best_score = sentence, score
    return best


def _form(sentence: str, index: int) -> float:
    """What the form of a sentence adds to its score, at most `_MOST_ADDED`; `index` is its number, from 0."""
    score = (0.3 if _WHOLE.match(sentence) else 0.0) + (0.15 if _INTRODUCTION.match(sentence) else 0.0)
    place = _PLACE.match(sentence)
    if _about_surroundings(sentence, index):
        score -= 0.8
    elif index and (place or _REFERENCE.match(sentence)):
        score -= 0.5
    elif place and place["of_picture"]:
        score -= 0.25
    return score


def _about_surroundings(sentence: str, index: int) -> bool:
    """Whether it is only about the weather, the light, or, after the first sentence, the ground or a text."""
    match = _SURROUNDINGS.match(sentence)
    if match is None or (not index and match["what"].lower() in _SUBJECTS):
        return False
    if match["what"].lower() not in _WHEN:
        return True
    # "A sunny day in a park" names a place; "A sunny day outside with a blue sky" does not.
    return not set(content_words(sentence[match.end() :])) - _LOCATIONS - _WEATHER
