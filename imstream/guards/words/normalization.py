"""Normalization: one form for all the ways in which the same letters can be written.

Case, width, letter styles and accents are removed (NFKD, case folding). Each character becomes one or more letters, or
one of four kinds of separators. Vowel signs and other marks count as letters of their own script; after a letter of
another script, where no ordinary text has them, they are ignored.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Final

# The separators. They are the only white space in normalized text, so that the automaton and `str.split` skip them.
IGNORED: Final = "\t"  # invisible characters, controls, accents on their own, marks of another script than the letter
LIGHT: Final = "\v"  # signs within words and between letters: `.`, `-`, `_`, `*`, symbols, emoji
SPACE: Final = " "
HEAVY: Final = "\n"  # signs between words, clauses and lines: commas, quotes, apostrophes, brackets, line breaks
SEPARATORS: Final = IGNORED + LIGHT + SPACE + HEAVY

# Scripts without spaces between words, or whose words take endings: word boundaries cannot be found.
UNSPACED: Final = (
    "\u0e00-\u109f"  # Thai, Lao, Tibetan, Burmese
    "\u1100-\u11ff"  # Hangul, decomposed
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Khmer, Tai
    "\u2e80-\u9fff"  # Chinese, Japanese
    "\ua960-\ua97f\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff"  # Hangul, Burmese, Tai, Chinese
    "\U0001b000-\U0001b2ff\U00020000-\U0003ffff"  # Japanese, Chinese
)
_is_unspaced = re.compile(f"[{UNSPACED}]").match

_HEAVY_SIGNS = frozenset(",;:!?'\"`()[]{}<>\u3001\u3002\uff61\u2026\u2014\u2013\n\r")
_HEAVY_CATEGORIES = frozenset({"Ps", "Pe", "Pi", "Pf", "Zl", "Zp"})
_IGNORED_CATEGORIES = frozenset({"Cf", "Cc", "Co", "Me", "Cn"})  # Cn: also characters of a newer Unicode than Python's

# Invisible characters of other categories: fillers, blanks, variation selectors, code points reserved for them
# (Default_Ignorable_Code_Point), and the tatweel, which only stretches a letter.
_is_invisible = re.compile(
    "[\u034f\u0640\u07fa\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\ufe00-\ufe0f\ufff0-\ufffd"
    "\U0001d159\U000e0000-\U000e0fff]"
).match

# Precedes each mark in the forms of characters that are marks only: the letter before decides whether it is ignored.
_MARK_PREFIX: Final = "\x00"
_KANA = frozenset({"HIRAGANA", "KATAKANA"})
_VOICING_MARKS = frozenset("\u3099\u309a")  # of both kana: alone of the marks named COMBINING, they make another letter
_IOTA_SUBSCRIPT = "\u0345"  # an accent in Greek that case folding would turn into a letter
# White letters on dark circles and squares: Unicode decomposes the other circled letters, but not these.
_NEGATIVE = {chr(first + at): chr(ord("a") + at) for first in (0x1F150, 0x1F170) for at in range(26)}
_CACHE_SIZE = 100_000  # forms, 15 MB: ordinary text has a few thousand characters


class _Forms(dict[int, str]):
    """Cache of the normalized forms of characters, by code point, for `str.translate`."""

    def __missing__(self, code: int) -> str:
        if len(self) >= _CACHE_SIZE:  # filled by a client that sends all of Unicode
            self.clear()
        form = self[code] = _normalize_char(chr(code))
        return form


_FORMS = _Forms()


def normalize(text: str, *, after: str = "") -> str:
    """Normalize text. `after`: the last normalized letter of the text before it.

    The result has the length of the text unless one of its characters stands for several letters.
    """
    normal = text.translate(_FORMS)
    return _resolve_marks(normal, after) if _MARK_PREFIX in normal else normal


def strip_ignored(normal: str) -> str:
    """Remove the ignored characters from normalized text."""
    return normal.replace(IGNORED, "")


def last_letter(normal: str) -> str:
    """The last letter of normalized text; empty for a text without letters."""
    return normal.rstrip()[-1:]


def source_indexes(text: str, normal: str) -> range | list[int]:
    """For each character of the normalized text, the index of the character of the text that it comes from."""
    if len(normal) == len(text):  # each gives at least one
        return range(len(text))
    return [index for index, char in enumerate(text) for part in _FORMS[ord(char)] if part != _MARK_PREFIX]


def is_spaced(letter: str) -> bool:
    """Whether a letter or digit is of a script with spaces between words, such as Latin."""
    return not letter.isspace() and _is_unspaced(letter) is None


def is_dependent(letter: str) -> bool:
    """Whether a letter of an unspaced script belongs to the one before it: a vowel sign, a voicing mark."""
    is_jamo = "\u1160" <= letter <= "\u11ff" or "\ud7b0" <= letter <= "\ud7ff"  # Hangul vowels and finals
    return is_jamo or unicodedata.category(letter)[0] == "M"


def _resolve_marks(normal: str, letter: str) -> str:
    """Keep the marks of the script of the letter before them, and ignore the others."""
    first, *others = normal.split(_MARK_PREFIX)
    parts, letter = [first], last_letter(first) or letter
    for part in others:
        mark, rest = part[0], part[1:]
        mark_script, script = _script(mark), _script(letter) if letter else None
        if mark_script == script or (mark in _VOICING_MARKS and script in _KANA):
            letter = mark
        else:
            mark = IGNORED
        parts.append(mark + rest)
        letter = last_letter(rest) or letter
    return "".join(parts)


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The script of a letter or mark: the first word of its name."""
    return unicodedata.name(char, "").partition(" ")[0]


def _normalize_char(char: str) -> str:
    if char in _HEAVY_SIGNS:  # before NFKD turns an ellipsis into three full stops
        return HEAVY
    if char in _NEGATIVE:
        return _NEGATIVE[char]
    plain = unicodedata.normalize("NFKD", char).replace(_IOTA_SUBSCRIPT, "")
    plain = unicodedata.normalize("NFKD", plain.casefold())
    if plain[:1] == SPACE and unicodedata.category(char) != "Zs":  # a spacing mark, decomposed to space and mark
        plain = plain.strip(SPACE)
        plain = plain if any(_classify(part) not in SEPARATORS for part in plain) else "."
    form = "".join(map(_classify, plain)).replace(IGNORED, "")
    if form and all(unicodedata.category(part)[0] == "M" for part in form):
        return "".join(_MARK_PREFIX + mark for mark in form)
    return form or IGNORED


def _classify(char: str) -> str:
    """A letter or digit unchanged; for any other character, its kind of separator."""
    category = unicodedata.category(char)
    if char in _HEAVY_SIGNS or category in _HEAVY_CATEGORIES:
        return HEAVY
    if char == "\t" or category == "Zs":
        return SPACE
    if category in _IGNORED_CATEGORIES or _is_invisible(char) or _is_accent(char):
        return IGNORED
    if category == "Lm" and unicodedata.name(char, "").startswith("MODIFIER LETTER"):
        return LIGHT  # of no script: apostrophes, marks of length and tone
    return char if category[0] in "LNM" else LIGHT


def _is_accent(char: str) -> bool:
    """Whether a mark only modifies a letter. Vowel signs and voicing marks make another letter of it."""
    place = unicodedata.combining(char)
    return place == 1 or 10 <= place <= 36 or place >= 200  # noqa: PLR2004 - overlays, points of Hebrew and Arabic, above and below
