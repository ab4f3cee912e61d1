"""A list of words, found in normalized text (see `normalization`) whatever separators stand between their letters.

A text contains a listed word where

1. the letters and digits of the word follow each other, with their marks in any equivalent order,
2. at most `MAX_GAP` *light* separators stand between them: `f.u-ck`, `敏*感`; and any number of ignored characters. A
   *heavy* separator (comma, quote, bracket, line break) ends a word, and so does a space between letters of spaced
   scripts: "pen is" is not "penis", "he'll" is not "hell", 男性,感觉 is not 性感. It does not where the listed word has
   a gap, too, and where three or more letters all stand alone: `f u c k`, `敏,感,词`,
3. and no letter or digit of a spaced script touches a first or last letter of such a script: `ass` is in `a.s.s` and in
   你ass他, not in `class` or `ass1`. In unspaced scripts a word may be part of another.
"""

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, pairwise
from operator import add, itemgetter
from typing import Any

import ahocorasick

from imstream.guards.words.normalization import HEAVY, SEPARATORS, SPACE, is_dependent, is_spaced, strip_ignored

MAX_GAP = 16  # separators between two letters of a word
_MIN_ALONE = 3  # letters of a word that is found when all of them stand alone
_MAX_ORDERS = 64  # of the marks of a word; usually there are two
_SHORT = 128  # length of a text that is searched for prefixes before the full search
_UNSPACED = "\u2e80"  # first character of the large unspaced scripts: from here on, words may begin anywhere
_SHARE = 20_000  # approximate words of one automaton: building one blocks all threads, 0.1 s for 100,000 words

_GAP = re.compile(r"\s+")
_RUN = re.compile(r"\S+")

# The automaton's alphabet: a character for each byte of UTF-8, because it searches the children of a node one by one
# and the root would have thousands of characters. Above ASCII none is white space, which the automaton skips.
_SYMBOLS = "".join(map(chr, (*range(0x80), *range(0x100, 0x180))))


class WordList:
    """Searches text for normalized words of at least one letter; separators in them are gaps. 100,000 take 0.5 s."""

    def __init__(self, words: Iterable[str]) -> None:
        self._gaps = dict[str, frozenset[int]]()  # for words with gaps, the indexes of the letters after them
        letters = set[str]()
        for word in chain.from_iterable(map(_orders, map(strip_ignored, words))):
            plain = "".join(word.split())
            letters.add(plain)
            if len(plain) < len(word):
                gaps = {len("".join(word[: gap.start()].split())) for gap in _GAP.finditer(word)}
                self._gaps[plain] = self._gaps.get(plain, frozenset()) | gaps
        self._single_letters = {word for word in letters if len(word) == 1}
        firsts = {word[0] for word in letters}
        # How words begin: with one letter, two letters, or a letter and a separator.
        self._prefixes = firsts | {word[:2] for word in letters} | {a + b for a in firsts for b in SEPARATORS}
        self._max_length = max(map(len, letters), default=0)
        self._automata = [({word[0] for word in share}, _automaton(share)) for share in _shares(letters)]
        self._automaton_by_first = {first: automaton for firsts, automaton in self._automata for first in firsts}
        self._count = len({unicodedata.normalize("NFD", word) for word in letters})

    def __len__(self) -> int:
        return self._count

    def find(self, normal: str, *, before: str = "") -> Iterator[tuple[int, int]]:
        """Yield start and end of each word in normalized text without ignored characters, in no order.

        `before`: the character before the text. No word begins there, but it may touch one.
        """
        for last, length in self._letter_matches(normal):
            if "0" <= normal[last] <= "z" and "0" <= normal[last + 1 : last + 2] <= "z":
                continue  # quick check: usually a part of a longer word
            if _ends_at(normal, last):
                first = _index_of_first(normal, last, length)
                if _begins_at(normal, first, before) and self._allows_gaps(normal[first : last + 1]):
                    yield first, last + 1

    def pending_start(self, normal: str, *, before: str = "") -> tuple[int, bool]:
        """Where in an incomplete text the first word may begin whose end is not known yet; its length if none does.

        The second value is whether there may be complete words before it: then `find` them.
        """
        if len(normal) > _SHORT:
            skipped = self._tail_start(normal)
            return skipped + self._pending_start(normal[skipped:], normal[:skipped] or before)[0], True
        return self._pending_start(normal, before)

    def _pending_start(self, normal: str, before: str) -> tuple[int, bool]:
        if normal.isascii():
            return self._pending_start_ascii(normal, before)
        prefixes, may_match = self._prefixes, not self._single_letters.isdisjoint(normal)
        if normal[-1] > "z" and not may_match and prefixes.isdisjoint(map(add, normal, normal[1:])):
            return len(normal) - (normal[-1] in prefixes), False
        for at, prefix in enumerate(map(add, normal, normal[1:] + SPACE)):
            if prefix in prefixes and (prefix > _UNSPACED or _begins_at(normal, at, before)):
                rest, automaton = _symbols("".join(normal[at:].split())), self._automaton_by_first[prefix[0]]
                if automaton.match(rest):
                    return at, may_match
                # This finds a word anywhere in the rest, not only here: good enough for "may".
                may_match = may_match or next(automaton.iter(rest, 0, automaton.longest_prefix(rest)), None) is not None
        return len(normal), may_match

    def _pending_start_ascii(self, normal: str, before: str) -> tuple[int, bool]:
        """The same in ASCII, where words begin and end with runs of letters."""
        runs, may_match = normal.split(), False
        touched = bool(runs) and not normal[0].isspace() and "0" <= before[-1:] <= "z"
        for number in range(touched, len(runs)):
            if runs[number][:2] in self._prefixes:
                rest, automaton = "".join(runs[number:]), self._automaton_by_first[runs[number][0]]
                if automaton.match(rest):
                    return [run.start() for run in _RUN.finditer(normal)][number], may_match
                reach, length = automaton.longest_prefix(rest), 0
                for run in runs[number:]:
                    length += len(run)
                    may_match = may_match or (length <= reach and rest[:length] in automaton)
        return len(normal), may_match

    def _tail_start(self, normal: str) -> int:
        """Where the longest word would begin that is incomplete at the end of the text."""
        letters = gap = 0
        for index in range(len(normal) - 1, -1, -1):
            if normal[index].isspace():
                gap += 1
                if gap > MAX_GAP:
                    return index + gap
            else:
                gap = 0
                letters += 1
                if letters == self._max_length:
                    return index
        return 0

    def _letter_matches(self, normal: str) -> Iterator[tuple[int, int]]:
        """Yield index of the last letter and number of letters of each sequence with the letters of a word."""
        letters = set(normal)
        automata = [automaton for firsts, automaton in self._automata if not firsts.isdisjoint(letters)]
        if normal.isascii():
            for automaton in automata:
                yield from automaton.iter(normal, ignore_white_space=True)
            return
        encoded = normal.encode()
        symbols = _from_utf8(encoded)
        for automaton in automata:
            index, at = -1, 0
            for last, length in automaton.iter(symbols, ignore_white_space=True):
                index += len(encoded[at : last + 1].decode())
                at = last + 1
                yield index, length

    def _allows_gaps(self, span: str) -> bool:
        """Whether the separators between the letters of a word leave it one word (rule 2)."""
        plain = "".join(span.split())
        if len(plain) == len(span):
            return True
        gaps, breaks, separators = 0, [], 0
        for gap in _GAP.finditer(span):
            run = gap[0]
            if len(run) > MAX_GAP:
                return False
            gaps += 1
            if HEAVY in run or (SPACE in run and is_spaced(span[gap.start() - 1]) and is_spaced(span[gap.end()])):
                breaks.append(gap.start() - separators)
            separators += len(run)
        all_alone = gaps == len(plain) - 1 and len(plain) >= _MIN_ALONE
        return all_alone or not breaks or self._gaps.get(plain, frozenset()).issuperset(breaks)


def _orders(word: str) -> set[str]:
    """The word with its marks in each equivalent order (Unicode): Burmese and Thai are typed in several."""
    if not any(map(unicodedata.combining, word)):
        return {word}
    orders, new = set[str](), {word, unicodedata.normalize("NFD", word)}
    while new and len(orders) < _MAX_ORDERS:
        orders |= new
        new = {
            order[:at] + order[at + 1] + order[at] + order[at + 2 :]
            for order in new
            for at, (one, other) in enumerate(pairwise(map(unicodedata.combining, order)))
            if one and other and one != other
        } - orders
    return orders


def _shares(words: Iterable[str]) -> Iterator[list[str]]:
    """Split the words by first letter into shares of about `_SHARE`; texts without these letters skip a share."""
    share = list[str]()
    for first, group in groupby(sorted(words), key=itemgetter(0)):
        if share and (len(share) >= _SHARE or share[0][0].isascii() != first.isascii()):
            yield share
            share = []
        share += group
    if share:
        yield share


def _automaton(words: list[str]) -> Any:  # noqa: ANN401 - the package is without types
    automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
    for word in words:
        automaton.add_word(_symbols(word), len(word))
    automaton.make_automaton()
    return automaton


def _symbols(normal: str) -> str:
    return normal if normal.isascii() else _from_utf8(normal.encode())


def _from_utf8(encoded: bytes) -> str:
    return codecs.charmap_decode(encoded, "strict", _SYMBOLS)[0]


def _index_of_first(normal: str, last: int, length: int) -> int:
    """The index of the first of `length` letters that end at `last`."""
    first = last + 1
    while length:
        first -= 1
        length -= not normal[first].isspace()
    return first


def _begins_at(normal: str, first: int, before: str) -> bool:
    """Whether no letter touches the one at `first` from the left (rule 3)."""
    previous = normal[first - 1] if first else before[-1:]
    return not (previous and is_spaced(previous) and is_spaced(normal[first]))


def _ends_at(normal: str, last: int) -> bool:
    """Whether no letter touches the one at `last` from the right (rule 3)."""
    following = normal[last + 1 : last + 2]
    if not following or following.isspace():
        return True
    return not (is_spaced(following) if is_spaced(normal[last]) else is_dependent(following))
