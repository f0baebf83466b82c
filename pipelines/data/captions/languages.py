"""A cheap check of a text's language, by its most frequent words and its letters.

It tells seven European languages from each other, and Latin from other scripts. It cannot tell languages that are not
in the table from each other: of those it only says that the text is in none of the seven.
"""

import re
import unicodedata

FUNCTION_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the a an of and to in is are on with it its at from by as that this there has be which for his her",
        "German": "der die das ein eine einen einem einer und ist sind im in mit auf von zu den dem des nicht es sich"
        " sie er an am vor hinter",
        "French": "le la les un une des du de et est sont dans sur avec il elle en au aux qui que ce cette par son sa",
        "Spanish": "el la los las un una unos de del y es son en con por que se su sus al hay está están lo para",
        "Italian": "il lo la i gli le un una di del della dei e è sono in con su sul che si al alla da nel nella per",
        "Portuguese": "o a os as um uma uns de do da dos das e é são em no na com por que se seu sua ao há está para",
        "Dutch": "de het een en is zijn in op met van te aan dat die er voor naar om bij zich deze dit ook door",
    }.items()
}
MIN_SHARE = 0.12
"""Least share of function words in running text of their language; 0.26 is the least of 8,498 English captions."""
MIN_LATIN = 0.8
MIN_WORDS = 8
_WORD = re.compile(r"[^\W\d_]+")


def is_in_language(text: str, language: str) -> bool:
    """Whether a text may be in a language: not in another one of the table, and in the table's if it has it.

    Quotations in another language are harmless as long as most of the text is in the right one. Texts of fewer than
    `MIN_WORDS` words are not judged.
    """
    asked = next((name for name in FUNCTION_WORDS if name.casefold() == language.strip().casefold()), None)
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters)
    if asked and latin < MIN_LATIN * len(letters):
        return False
    words = _WORD.findall(text.casefold())
    if len(words) < MIN_WORDS:
        return True
    shares = {name: sum(word in table for word in words) / len(words) for name, table in FUNCTION_WORDS.items()}
    likeliest = max(shares, key=lambda name: shares[name])
    if shares[likeliest] < MIN_SHARE:
        return asked is None
    return likeliest == asked
