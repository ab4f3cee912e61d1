"""Text as word lists see it: one normal form for all the ways in which the same letters can be written.

Case, width and the many styles of letters are taken away (NFKD, case folding), and so are accents. What is left of each
character is one letter or more, or one of four kinds of signs that are no letters; matching skips these, by the rules
of `word_list`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

NOTHING: Final = "\t"
"""Stands for what is not seen: zero-width characters, soft hyphens, controls, accents on their own."""

LIGHT: Final = "\v"
"""Stands for signs within words and between letters: `.`, `-`, `_`, `*`, symbols, emoji."""

SPACE: Final = " "
"""Stands for spaces."""

HEAVY: Final = "\n"
"""Stands for what parts words, clauses and lines: commas, quotes and apostrophes, brackets, line breaks."""

SIGNS: Final = NOTHING + LIGHT + SPACE + HEAVY
"""All four. They are white space, as nothing else in a normal form is: the automaton and `str.split` leave it out."""

DENSE: Final = (
    "\u0e00-\u109f"  # Thai, Lao, Tibetan, Burmese
    "\u1100-\u11ff"  # Hangul, decomposed
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Khmer, Tai
    "\u2e80-\u9fff"  # Chinese, Japanese
    "\ua960-\ua97f\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff"  # Hangul, Burmese, Tai, Chinese
    "\U0001b000-\U0001b2ff\U00020000-\U0003ffff"  # Japanese, Chinese
)
"""Scripts written without spaces between words, or whose words take endings: there are no whole words to find."""

_IS_DENSE = re.compile(f"[{DENSE}]").match

_HEAVY_SIGNS = frozenset(",;:!?'\"`()[]{}<>\u3001\u3002\uff61\u2026\u2014\u2013\n\r\v\f\x1c\x1d\x1e\x1f\x85")
_HEAVY_CATEGORIES = frozenset({"Ps", "Pe", "Pi", "Pf", "Zl", "Zp"})
_UNSEEN_CATEGORIES = frozenset({"Cf", "Cc", "Me"})

_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]").match
"""Unseen by their nature though not by their category: fillers and variation selectors."""

_NEGATIVE = {chr(first + at): chr(ord("a") + at) for first in (0x1F150, 0x1F170) for at in range(26)}
"""White letters on dark circles and squares, which Unicode, unlike the others in circles, takes for symbols."""

_MOST_REMEMBERED = 100_000
"""Forms that are remembered, some 15 MB at most: those of ordinary characters are a few thousand."""


class _Forms(dict[int, str]):
    """The normal forms of characters, by code point, found when they are first asked for."""

    def __missing__(self, code: int) -> str:
        if len(self) >= _MOST_REMEMBERED:  # somebody sends all there are: ordinary ones must not stay out for that
            self.clear()
        form = self[code] = _form(chr(code))
        return form


_FORMS = _Forms()


def normalise(text: str) -> str:
    """The normal form. It is as long as the text, if no character of it stands for several letters."""
    return text.translate(_FORMS)


def origins(text: str, normal: str) -> range | list[int]:
    """For each character of the normal form, the index of the character of the text that it comes from."""
    if len(normal) == len(text):  # each gives at least one
        return range(len(text))
    return [index for index, char in enumerate(text) for _ in _FORMS[ord(char)]]


def is_spaced(letter: str) -> bool:
    """Whether a letter or digit is of a script that has spaces between words, as Latin has."""
    return not letter.isspace() and _IS_DENSE(letter) is None


def continues(letter: str) -> bool:
    """Whether a letter of a dense script is a part of the character before it: a vowel sign, a voicing mark."""
    return unicodedata.category(letter)[0] == "M" or "\u1160" <= letter <= "\u11ff"


def _form(char: str) -> str:
    if char in _HEAVY_SIGNS:  # before an ellipsis becomes three full stops
        return HEAVY
    if char in _NEGATIVE:
        return _NEGATIVE[char]
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    return "".join(_kind(part) for part in plain).replace(NOTHING, "") or NOTHING


def _kind(char: str) -> str:
    """A letter or digit as it is, and the kind of all else."""
    category = unicodedata.category(char)
    if char in _HEAVY_SIGNS or category in _HEAVY_CATEGORIES:
        return HEAVY
    if char == "\t" or category == "Zs":
        return SPACE
    if category in _UNSEEN_CATEGORIES or _UNSEEN(char) or _is_accent(char):
        return NOTHING
    return char if category[0] in "LNM" else LIGHT


def _is_accent(char: str) -> bool:
    """Whether a mark only adorns a letter. Vowel signs and voicing marks make another letter of it."""
    place = unicodedata.combining(char)
    return place == 1 or 10 <= place <= 36 or place >= 200  # noqa: PLR2004 - overlays, points of Hebrew and Arabic, above and below
