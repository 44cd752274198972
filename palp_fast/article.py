"""English articles: "a" or "an" by sound, and nouns that take neither."""

from __future__ import annotations

import re

# Spelled with a vowel, spoken with "you" or "w": a university, a European, a one-eyed cat.
_CONSONANT_SOUND = re.compile(
    r"uni(?!n|m|d)|u[bcfghjkqrst][aeiou]|ubiq|ukr|eu|ewe|onc?e(?![a-z])|ouija", re.IGNORECASE
)
# Spelled with "u" and caught above, yet spoken with a vowel.
_SPOKEN_U = re.compile(r"uber", re.IGNORECASE)
# Spelled with a consonant, spoken with a vowel: an hourglass, an heirloom, an 8-ball, an X-ray.
_SILENT_H = re.compile(r"hour|heir|honest|honou?r|8|1[18](?!\d)|x-?ray", re.IGNORECASE)
_ACRONYM = re.compile(r"[A-Z]{2,}s?\b|[A-Z]\b")
_VOWEL_LETTERS = "AEFHILMNORSX"

_MASS_NOUNS = frozenset(
    """
    art baggage bread butter cash cattle clothing coral cutlery equipment fire food footwear furniture glassware grass
    hair jewellery jewelry lightning luggage machinery meat milk money music pasta people police rice sand seafood
    silverware smoke snow stationery tableware water weather
    children feet geese men mice teeth women
    """.split()
)
_SINGULAR_IN_S = frozenset("atlas canvas christmas gas lens news pancreas rhinoceros series species".split())


def indefinite_article(phrase: str) -> str:
    """ "a" or "an", by the sound that `phrase` starts with."""
    word = phrase.lstrip(" \"'“‘(")
    if _ACRONYM.match(word):
        return "an" if word[0] in _VOWEL_LETTERS else "a"
    if _SILENT_H.match(word) or _SPOKEN_U.match(word):
        return "an"
    if _CONSONANT_SOUND.match(word):
        return "a"
    return "an" if word[:1].lower() in tuple("aeiouàáâäåæèéêëìíîïòóôöøùúûü") else "a"


def takes_article(phrase: str) -> bool:
    """Whether "a" fits, judged by the last word: not before plurals ("glasses") and mass nouns ("clothing")."""
    words = re.findall(r"[^\W\d_]+", phrase.lower())
    last = words[-1] if words else ""
    if last in _MASS_NOUNS:
        return False
    return last in _SINGULAR_IN_S or not last.endswith("s") or last.endswith(("ss", "us", "is"))
