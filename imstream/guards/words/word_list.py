"""A list of words, found in texts whatever their case, width, accents, and the signs between their letters.

A word of the list is in a text where

1. its letters and digits follow each other in the text's normal form (see `normal_text`),
2. only *light* signs stand between them, `f.u-ck` or `敏*感`, at most `MAX_GAP` in a row. What is not seen counts for
   nothing, however much there is of it. What parts words or clauses ends a word: "pen is" is not "penis", "he'll" is
   not "hell", 男性,感觉 is not 性感. That is commas, quotes, brackets and line breaks, and between letters of spaced
   scripts also spaces. It ends no word where the list has a gap as well, and none whose letters, three or more, all
   stand alone: `f u c k`, `敏,感,词`,
3. and where it begins or ends with a letter or digit of a spaced script, no other such touches it: `ass` is in `a.s.s`
   and in 你ass他, not in `class` or `ass1`. In dense scripts a word may stand within others.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from operator import add
from typing import Any

import ahocorasick

from imstream.guards.words.normalization import HEAVY, SIGNS, SPACE, continues, is_spaced, seen

MAX_GAP = 16
"""Most characters between two letters of one word."""

_ALONE = 3
"""How many letters a word must have for it to be seen when they are all set apart."""

_GLANCE = 128
"""Longest text that is worth a glance before it is searched."""

_SPACED = "\u2e80"
"""Where the large dense scripts begin: beyond it, there is no need to look closely."""

_SHARE = 20_000
"""About how many words share an automaton. While one is made, no other thread runs: for 100,000, that were 0.1 s."""

_GAP = re.compile(r"\s+")
_RUN = re.compile(r"\S+")

_SYMBOLS = "".join(map(chr, (*range(0x80), *range(0x100, 0x180))))
"""What the automaton sees of each byte of UTF-8. A node's children are searched one by one: by characters, thousands at
the root. None of those above ASCII is white space, which the automaton skips."""


class WordList:
    """Words, ready to be searched for. Building one of 100,000 takes half a second."""

    def __init__(self, words: Iterable[str]) -> None:
        """Take words in normal form, each with at least one letter. Signs in them are gaps."""
        self._gaps = dict[str, frozenset[int]]()
        """For words with gaps: before which of their letters."""
        letters = set[str]()
        for word in map(seen, words):
            plain = "".join(word.split())
            letters.add(plain)
            if len(plain) < len(word) and (gaps := _gaps_of(word)):
                self._gaps[plain] = self._gaps.get(plain, frozenset()) | gaps
        self._singles = {word for word in letters if len(word) == 1}
        firsts = {word[0] for word in letters}
        self._heads = firsts | {word[:2] for word in letters} | {first + sign for first in firsts for sign in SIGNS}
        """By what words begin: one letter, two letters, one letter and a sign."""
        self._longest = max(map(len, letters), default=0)
        self._automata = [({word[0] for word in share}, _automaton(share)) for share in _shares(letters)]
        self._by_first = {first: automaton for firsts, automaton in self._automata for first in firsts}
        self._count = len(letters)

    def __len__(self) -> int:
        return self._count

    def find(self, normal: str, *, before: str = "") -> Iterator[tuple[int, int]]:
        """Where words begin and end in a text in normal form, without what is not seen, in no order.

        Args:
            normal: The text.
            before: The last character before it: no word begins there, but it may touch one.
        """
        for last, count in self._runs(normal):
            if "0" <= normal[last] <= "z" and "0" <= normal[last + 1 : last + 2] <= "z":
                continue  # most are parts of longer words: a glance is enough
            if _ends(normal, last):
                first = _first(normal, last, count)
                if _may_begin(normal, first, before) and self._holds_together(normal[first : last + 1]):
                    yield first, last + 1

    def open_from(self, normal: str, *, before: str = "") -> tuple[int, bool]:
        """Where in a text that goes on the first word may have begun whose end is not known yet; its length if none.

        All words that begin earlier are known by now; the second value says, at a glance, whether there may be any.
        """
        if len(normal) <= _GLANCE:
            return self._open_from(normal, before)
        skip = self._tail(normal)
        return skip + self._open_from(normal[skip:], normal[:skip] or before)[0], True

    def _open_from(self, normal: str, before: str) -> tuple[int, bool]:
        if normal.isascii():
            return self._open_from_runs(normal, before)
        heads, doubt = self._heads, not self._singles.isdisjoint(normal)
        if normal[-1] > "z" and not doubt and heads.isdisjoint(map(add, normal, normal[1:])):
            return len(normal) - (normal[-1] in heads), False
        for at, head in enumerate(map(add, normal, normal[1:] + SPACE)):
            if head in heads and (head > _SPACED or _may_begin(normal, at, before)):
                rest, automaton = _symbols("".join(normal[at:].split())), self._by_first[head[0]]
                if automaton.match(rest):
                    return at, doubt
                # Some word is in what follows here; that it begins here is not asked.
                doubt = doubt or next(automaton.iter(rest, 0, automaton.longest_prefix(rest)), None) is not None
        return len(normal), doubt

    def _open_from_runs(self, normal: str, before: str) -> tuple[int, bool]:
        """The same in ASCII, where words begin and end with runs of letters."""
        runs, doubt = normal.split(), False
        touched = bool(runs) and not normal[0].isspace() and "0" <= before[-1:] <= "z"
        for number in range(touched, len(runs)):
            if runs[number][:2] in self._heads:
                rest, automaton = "".join(runs[number:]), self._by_first[runs[number][0]]
                if automaton.match(rest):
                    return [run.start() for run in _RUN.finditer(normal)][number], doubt
                reach, length = automaton.longest_prefix(rest), 0
                for run in runs[number:]:
                    length += len(run)
                    doubt = doubt or (length <= reach and rest[:length] in automaton)
        return len(normal), doubt

    def _runs(self, normal: str) -> Iterator[tuple[int, int]]:
        """The index of the last letter, and the number of letters, of whatever has the letters of a word."""
        letters = set(normal)
        automata = [automaton for firsts, automaton in self._automata if not firsts.isdisjoint(letters)]
        if normal.isascii():
            for automaton in automata:
                yield from automaton.iter(normal, ignore_white_space=True)
            return
        encoded = normal.encode()
        symbols = _encoded(encoded)
        for automaton in automata:
            index, at = -1, 0
            for last, count in automaton.iter(symbols, ignore_white_space=True):
                index += len(encoded[at : last + 1].decode())
                at = last + 1
                yield index, count

    def _tail(self, normal: str) -> int:
        """Where the longest word would begin that is not complete yet, if there was one."""
        letters = gap = 0
        for index in range(len(normal) - 1, -1, -1):
            if normal[index].isspace():
                gap += 1
                if gap > MAX_GAP:
                    return index + gap
            else:
                gap = 0
                letters += 1
                if letters == self._longest:
                    return index
        return 0

    def _holds_together(self, span: str) -> bool:
        """Whether what stands between the letters of a word leaves it one word."""
        plain = "".join(span.split())
        if len(plain) == len(span):
            return True
        gaps, parted, signs = 0, [], 0
        for gap in _GAP.finditer(span):
            run = gap[0]
            if len(run) > MAX_GAP:
                return False
            gaps += 1
            if HEAVY in run or (SPACE in run and is_spaced(span[gap.start() - 1]) and is_spaced(span[gap.end()])):
                parted.append(gap.start() - signs)
            signs += len(run)
        all_alone = gaps == len(plain) - 1 and len(plain) >= _ALONE
        return all_alone or not parted or self._gaps.get(plain, frozenset()).issuperset(parted)


def _shares(words: Iterable[str]) -> Iterator[list[str]]:
    """The words in sorted shares of about `_SHARE`, those that begin with the same letter in one.

    A text without any of a share's first letters need not be searched for its words: Chinese is not for English ones.
    """
    by_first = dict[str, list[str]]()
    for word in words:
        by_first.setdefault(word[0], []).append(word)
    share = list[str]()
    for first in sorted(by_first):
        if share and (len(share) >= _SHARE or share[0][0].isascii() != first.isascii()):
            yield share
            share = []
        share += sorted(by_first[first])
    if share:
        yield share


def _automaton(words: list[str]) -> Any:  # noqa: ANN401 - the package is without types
    automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
    for word in words:
        automaton.add_word(_symbols(word), len(word))
    automaton.make_automaton()
    return automaton


def _may_begin(normal: str, at: int, before: str) -> bool:
    """Whether no letter touches the one at this index from the left."""
    previous = normal[at - 1] if at else before[-1:]
    return not (previous and is_spaced(previous) and is_spaced(normal[at]))


def _symbols(normal: str) -> str:
    return normal if normal.isascii() else _encoded(normal.encode())


def _encoded(utf_8: bytes) -> str:
    return codecs.charmap_decode(utf_8, "strict", _SYMBOLS)[0]


def _gaps_of(word: str) -> frozenset[int]:
    """Before which of its letters a word of the list has a gap."""
    gaps, signs = set[int](), 0
    for gap in _GAP.finditer(word):
        gaps.add(gap.start() - signs)
        signs += len(gap[0])
    return frozenset(gaps)


def _first(normal: str, last: int, count: int) -> int:
    """The index of the letter by which so many letters begin that end at `last`."""
    first = last
    while True:
        if not normal[first].isspace():
            count -= 1
            if count == 0:
                return first
        first -= 1


def _ends(normal: str, last: int) -> bool:
    """Whether no letter touches the one at `last` from the right."""
    touching = normal[last + 1 : last + 2]
    if not touching or touching.isspace():
        return True
    return not (is_spaced(touching) if is_spaced(normal[last]) else continues(touching))
