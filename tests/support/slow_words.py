"""A slow reference implementation of the word filter: compares every part of a text with every word."""

import unicodedata
from collections.abc import Iterable
from itertools import pairwise

from imstream.guards.words.normalization import (
    HEAVY,
    IGNORED,
    SEPARATORS,
    SPACE,
    is_dependent,
    is_spaced,
    normalize,
    source_indexes,
)

_MAX_GAP = 16


def slowly_masked(text: str, words: Iterable[str]) -> str:
    """Mask the words of a list in a text."""
    # Each visible character of the normal form, with the index of its original character.
    whole = normalize(text)
    parts = [(part, index) for part, index in zip(whole, source_indexes(text, whole), strict=True) if part != IGNORED]
    normal = "".join(part for part, _ in parts)
    masked = list(text)
    for word in (normalize(word).replace(IGNORED, "") for word in words):
        for first in range(len(parts)):
            for last in range(first, len(parts)):
                if normal[first] == word[0] and _is_word(normal, first, last, word):
                    for index in range(parts[first][1], parts[last][1] + 1):
                        masked[index] = "＊"
    return "".join(masked)


def _is_word(normal: str, first: int, last: int, word: str) -> bool:
    letters = [part for part in word if part not in SEPARATORS]
    here = [(at, part) for at, part in enumerate(normal[first : last + 1]) if part not in SEPARATORS]
    if (
        _ordered(part for _, part in here) != _ordered(letters)
        or normal[first] in SEPARATORS
        or normal[last] in SEPARATORS
    ):
        return False
    gaps = [normal[first:][one + 1 : other] for (one, _), (other, _) in pairwise(here)]
    if any(len(gap) > _MAX_GAP for gap in gaps):
        return False
    alone = len(letters) >= 3 and all(gaps)
    for number, gap in enumerate(gaps, 1):
        spaced = is_spaced(letters[number - 1]) and is_spaced(letters[number])
        parts = HEAVY in gap or (SPACE in gap and spaced)
        if parts and not alone and number not in _gaps_of(word):
            return False
    return not _touches_left(normal[:first], letters[0]) and not _touches_right(normal[last + 1 :], letters[-1])


def _ordered(letters: Iterable[str]) -> str:
    """Letters with their marks in Unicode's canonical order."""
    return unicodedata.normalize("NFD", "".join(letters))


def _gaps_of(word: str) -> set[int]:
    gaps, letters = set[int](), 0
    for part in word:
        if part not in SEPARATORS:
            letters += 1
        else:
            gaps.add(letters)
    return gaps


def _touches_left(text: str, letter: str) -> bool:
    neighbour = text[-1:]
    return neighbour != "" and is_spaced(neighbour) and is_spaced(letter)


def _touches_right(text: str, letter: str) -> bool:
    neighbour = text[:1]
    if neighbour == "" or neighbour in SEPARATORS:
        return False
    return is_spaced(neighbour) if is_spaced(letter) else is_dependent(neighbour)
