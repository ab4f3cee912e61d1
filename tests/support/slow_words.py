"""Words found the slow way: every stretch of a text is held against every word, by the rules as they are written."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from imstream.guards.normal_text import HEAVY, NOTHING, SIGNS, SPACE, continues, is_spaced, normalise

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_GAP = 16


def slowly_masked(text: str, words: Iterable[str]) -> str:
    """The text with the words of a list masked."""
    # Each letter or sign of the normal form, with the index of its character.
    parts = [(part, index) for index, char in enumerate(text) for part in normalise(char)]
    normal = "".join(part for part, _ in parts)
    masked = list(text)
    for word in map(normalise, words):
        for first in range(len(parts)):
            for last in range(first, len(parts)):
                if normal[first] == word[0] and _is_word(normal, first, last, word):
                    for index in range(parts[first][1], parts[last][1] + 1):
                        masked[index] = "＊"
    return "".join(masked)


def _is_word(normal: str, first: int, last: int, word: str) -> bool:
    letters = [part for part in word if part not in SIGNS]
    here = [(at, part) for at, part in enumerate(normal[first : last + 1]) if part not in SIGNS]
    if [part for _, part in here] != letters or normal[first] in SIGNS or normal[last] in SIGNS:
        return False
    gaps = [normal[first:][one + 1 : other] for (one, _), (other, _) in pairwise(here)]
    if any(len(gap) > _MAX_GAP for gap in gaps):
        return False
    seen_gaps = [gap.replace(NOTHING, "") for gap in gaps]
    alone = len(letters) >= 3 and all(seen_gaps)
    for number, gap in enumerate(seen_gaps, 1):
        spaced = is_spaced(letters[number - 1]) and is_spaced(letters[number])
        parts = HEAVY in gap or (SPACE in gap and spaced)
        if parts and not alone and number not in _gaps_of(word):
            return False
    return not _touches_left(normal[:first], letters[0]) and not _touches_right(normal[last + 1 :], letters[-1])


def _gaps_of(word: str) -> set[int]:
    gaps, letters = set[int](), 0
    for part in word:
        if part not in SIGNS:
            letters += 1
        elif part != NOTHING:
            gaps.add(letters)
    return gaps


def _touches_left(text: str, letter: str) -> bool:
    unseen = len(text) - len(text.rstrip(NOTHING))
    neighbour = text.rstrip(NOTHING)[-1:]
    return unseen <= _MAX_GAP and neighbour != "" and is_spaced(neighbour) and is_spaced(letter)


def _touches_right(text: str, letter: str) -> bool:
    unseen = len(text) - len(text.lstrip(NOTHING))
    neighbour = text.lstrip(NOTHING)[:1]
    if unseen > _MAX_GAP or neighbour == "" or neighbour in SIGNS:
        return False
    return is_spaced(neighbour) if is_spaced(letter) else continues(neighbour)
