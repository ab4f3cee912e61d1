"""What becomes of a text with words of a list in it, whole or as it comes, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imstream.guards.guard import Refused
from imstream.guards.normal_text import normalise, origins
from imstream.guards.word_list import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imstream.guards.guard import Refuse
    from imstream.guards.word_list import WordList

MASK = "＊"
"""What each character of a word is shown as, and each sign between its letters. Of full width: `*` is Markdown."""


def has_word(text: str, words: WordList) -> bool:
    """Whether there is a word in a text."""
    return next(words.find(normalise(text)), None) is not None


def mask(text: str, words: WordList) -> str:
    """The text with its words masked."""
    normal = normalise(text)
    found = list(words.find(normal))
    if not found:
        return text
    return _covered(text, _in_text(found, origins(text, normal)))


class WordFilter:
    """Listens to an answer. Holds back what may become a word, and masks or refuses what is one."""

    __slots__ = ("_before", "_covered", "_held", "_refusal", "_words")

    def __init__(self, words: WordList, refusal: Refuse | None) -> None:
        """Without a refusal, words are masked."""
        self._words = words
        self._refusal = refusal
        self._held = ""
        self._covered = 0
        """How many characters of what is held back are part of a word that began before."""
        self._before = ""

    def feed(self, text: str) -> str:
        """See `AnswerFilter.feed`."""
        text = self._held + text
        normal = normalise(text)
        end, doubt = self._words.open_from(normal, before=self._before)
        if doubt or self._covered or len(normal) != len(text):
            return self._judge(text, normal, end)
        self._held = text[end:]
        self._before = (self._before + normal[:end])[-CONTEXT:]
        return text[:end]

    def end(self) -> str:
        """See `AnswerFilter.end`."""
        if not self._held:
            return ""
        normal = normalise(self._held)
        return self._judge(self._held, normal, len(normal))

    def _judge(self, text: str, normal: str, end: int) -> str:
        """Show the text up to `end`, an index of its normal form. Raises `Refused`."""
        origin = origins(text, normal)
        cut = origin[end] if end < len(normal) else len(text)
        while end > 0 and origin[end - 1] == cut:  # within what one character stands for: it is held back as a whole
            end -= 1
        # Of words that begin later, the end is not known: they are found again.
        words = self._words.find(normal, before=self._before)
        found = [(first, last) for first, last in words if first < end]
        if found and self._refusal is not None:
            raise Refused(self._refusal)
        spans = [(0, self._covered), *_in_text(found, origin)]
        shown = (_covered(text, spans) if found or self._covered else text)[:cut]
        self._covered = max(0, max(last for _, last in spans) - cut)
        self._held = text[cut:]
        self._before = (self._before + normal[:end])[-CONTEXT:]
        return shown


def _in_text(found: Iterable[tuple[int, int]], origin: range | list[int]) -> list[tuple[int, int]]:
    """Spans of the normal form as spans of the text."""
    return [(origin[first], origin[end - 1] + 1) for first, end in found]


def _covered(text: str, spans: Iterable[tuple[int, int]]) -> str:
    chars = list(text)
    for first, end in spans:
        chars[first:end] = MASK * (end - first)
    return "".join(chars)
