"""Text as word lists see it: one normal form for all the ways in which the same letters can be written.

Case, width and the many styles of letters are taken away (NFKD, case folding), and so are accents. What is left of each
character is one letter or more, or one of four kinds of signs that are no letters; matching skips these, by the rules
of `word_list`. Vowel signs and other marks are letters of their own script; after a letter of another one, where nobody
who writes it puts them, they are not seen.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final

NOTHING: Final = "\t"
"""Stands for what is not seen: zero-width characters, soft hyphens, controls, accents on their own, marks of a script
that is not that of the letter before."""

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
_UNSEEN_CATEGORIES = frozenset({"Cf", "Cc", "Me", "Cn"})
"""Formats, controls, enclosing marks, and what this Python knows nothing of: marks of a newer Unicode among it."""

_UNSEEN = re.compile(
    "[\u034f\u0640\u07fa\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\ufe00-\ufe0f\ufff0-\ufff8"
    "\U0001d159\U000e0000-\U000e0fff]"
).match
"""Unseen by their nature though not by their category: fillers, blanks, variation selectors, code points that Unicode
keeps for more of them (Default_Ignorable_Code_Point), and what only makes a letter longer (tatweel)."""

_MARKED: Final = "\x00"
"""Stands, in the form of a character that is nothing but marks, before each of them: whether they are seen depends on
the letter before. It is in no other form."""

_KANA = frozenset({"HIRAGANA", "KATAKANA"})
"""The scripts whose voicing marks, alone of all that Unicode calls just combining, make another letter."""

_SUBSCRIPT = "\u0345"
"""The iota under a Greek letter: an accent, of which case folding would make a letter."""

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


def normalise(text: str, *, after: str = "") -> str:
    """The normal form. It is as long as the text, if no character of it stands for several letters.

    Args:
        text: The text.
        after: The last letter of what came before it, in normal form.
    """
    normal = text.translate(_FORMS)
    return _settled(normal, after) if _MARKED in normal else normal


def seen(normal: str) -> str:
    """A normal form without what is not seen."""
    return normal.replace(NOTHING, "")


def last_letter(normal: str) -> str:
    """The last letter of a normal form; empty when there is none."""
    return normal.rstrip()[-1:]


def origins(text: str, normal: str) -> range | list[int]:
    """For each character of the normal form, the index of the character of the text that it comes from."""
    if len(normal) == len(text):  # each gives at least one
        return range(len(text))
    return [index for index, char in enumerate(text) for part in _FORMS[ord(char)] if part != _MARKED]


def is_spaced(letter: str) -> bool:
    """Whether a letter or digit is of a script that has spaces between words, as Latin has."""
    return not letter.isspace() and _IS_DENSE(letter) is None


def continues(letter: str) -> bool:
    """Whether a letter of a dense script is a part of the character before it: a vowel sign, a voicing mark."""
    return unicodedata.category(letter)[0] == "M" or "\u1160" <= letter <= "\u11ff"


def _settled(normal: str, letter: str) -> str:
    """The form with its marks: those of the script of the letter before them stay, the others are not seen."""
    first, *others = normal.split(_MARKED)
    parts, letter = [first], last_letter(first) or letter
    for part in others:
        mark, rest = part[0], part[1:]
        if not letter or not _belongs(_script(mark), _script(letter)):
            mark = NOTHING
        else:
            letter = mark
        parts.append(mark + rest)
        letter = last_letter(rest) or letter
    return "".join(parts)


def _belongs(mark: str, letter: str) -> bool:
    return mark == letter or (mark == "COMBINING" and letter in _KANA)


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The script of a letter or mark: its name begins with it. The names of voicing marks begin with `COMBINING`."""
    return unicodedata.name(char, "").partition(" ")[0]


def _form(char: str) -> str:
    if char in _HEAVY_SIGNS:  # before an ellipsis becomes three full stops
        return HEAVY
    if char in _NEGATIVE:
        return _NEGATIVE[char]
    plain = unicodedata.normalize("NFKD", char).replace(_SUBSCRIPT, "")
    plain = unicodedata.normalize("NFKD", plain.casefold())
    if plain[:1] == SPACE and unicodedata.category(char) != "Zs":  # a sign by itself: the space only carries it
        plain = plain.strip(SPACE)
        plain = plain if any(_kind(part) not in SIGNS for part in plain) else "."
    form = "".join(map(_kind, plain)).replace(NOTHING, "")
    if form and all(unicodedata.category(part)[0] == "M" for part in form):
        return "".join(_MARKED + mark for mark in form)
    return form or NOTHING


def _kind(char: str) -> str:
    """A letter or digit as it is, and the kind of all else."""
    category = unicodedata.category(char)
    if char in _HEAVY_SIGNS or category in _HEAVY_CATEGORIES:
        return HEAVY
    if char == "\t" or category == "Zs":
        return SPACE
    if category in _UNSEEN_CATEGORIES or _UNSEEN(char) or _is_accent(char):
        return NOTHING
    if category == "Lm" and unicodedata.name(char, "").startswith("MODIFIER LETTER"):
        return LIGHT  # of no script: apostrophes, marks of length and tone
    return char if category[0] in "LNM" else LIGHT


def _is_accent(char: str) -> bool:
    """Whether a mark only adorns a letter. Vowel signs and voicing marks make another letter of it."""
    place = unicodedata.combining(char)
    return place == 1 or 10 <= place <= 36 or place >= 200  # noqa: PLR2004 - overlays, points of Hebrew and Arabic, above and below
