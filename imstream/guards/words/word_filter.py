"""What becomes of a text with words of a list in it, whole or as it comes, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imstream.guards.guard import GuardRejection, Reject
from imstream.guards.words.normalization import NOTHING, last_letter, normalise, origins, seen
from imstream.guards.words.word_list import WordList

MASK = "＊"
"""What each character of a word is shown as, and each sign between its letters. Of full width: `*` is Markdown."""


def has_word(text: str, words: WordList) -> bool:
    """Whether there is a word in a text."""
    return next(words.find(seen(normalise(text))), None) is not None


def mask(text: str, words: WordList) -> str:
    """The text with its words masked."""
    normal = normalise(text)
    found = list(words.find(seen(normal)))
    if not found:
        return text
    origin = [at for at, part in zip(origins(text, normal), normal, strict=True) if part != NOTHING]
    return _covered(text, _in_text(found, origin))


class WordFilter:
    """Listens to an answer. Holds back what may become a word, and masks or refuses what is one.

    What is not seen is set aside, so that it costs no more than its length: there may be any amount of it in a word.
    """

    __slots__ = ("_before", "_covered", "_held", "_letter", "_normal", "_refusal", "_unseen", "_words")

    def __init__(self, words: WordList, refusal: Reject | None) -> None:
        """Without a refusal, words are masked."""
        self._words = words
        self._refusal = refusal
        self._held = ""
        self._normal = ""
        """The normal form of what is held back."""
        self._unseen: dict[int, list[str]] = {}
        """What is not seen, by the index of the held character that it comes before."""
        self._covered = 0
        """How many characters of what is held back are part of a word that began before."""
        self._before = ""
        self._letter = ""

    def feed(self, text: str) -> str:
        """See `AnswerFilter.feed`."""
        normal = normalise(text, after=self._letter)
        self._letter = last_letter(normal) or self._letter
        if NOTHING in normal:
            text, normal = self._set_aside(text, normal)
            if not text and self._held:
                return ""
        text, normal = self._held + text, self._normal + normal
        end, doubt = self._words.open_from(normal, before=self._before)
        if doubt or self._covered or len(normal) != len(text):
            return self._judge(text, normal, end)
        shown, self._held, self._normal = text[:end], text[end:], normal[end:]
        self._before = normal[:end][-1:] or self._before
        return self._with_unseen(shown, ()) if self._unseen else shown

    def end(self) -> str:
        """See `AnswerFilter.end`."""
        return self._judge(self._held, self._normal, len(self._normal)) if self._held else ""

    def _set_aside(self, text: str, normal: str) -> tuple[str, str]:
        """The text without what is not seen in it, and its normal form."""
        visible, length, at = list[str](), len(self._held), 0
        origin = origins(text, normal)
        for place in dict.fromkeys(origin[index] for index, part in enumerate(normal) if part == NOTHING):
            visible.append(text[at:place])
            length += place - at
            self._unseen.setdefault(length, []).append(text[place])
            at = place + 1
        return "".join([*visible, text[at:]]), seen(normal)

    def _judge(self, text: str, normal: str, end: int) -> str:
        """Show the text up to `end`, an index of its normal form. Raises `GuardRejection`."""
        origin = origins(text, normal)
        cut = origin[end] if end < len(normal) else len(text)
        while end > 0 and origin[end - 1] == cut:  # within what one character stands for: it is held back as a whole
            end -= 1
        # Of words that begin later, the end is not known: they are found again.
        words = self._words.find(normal, before=self._before)
        found = [(first, last) for first, last in words if first < end]
        if found and self._refusal is not None:
            raise GuardRejection(self._refusal)
        spans = _in_text(found, origin)
        shown = text if not (found or self._covered) else _covered(text, [(0, self._covered), *spans])
        shown = self._with_unseen(shown[:cut], spans) if self._unseen else shown[:cut]
        self._covered = max(0, self._covered - cut, *(last - cut for _, last in spans))
        self._held, self._normal = text[cut:], normal[end:]
        self._before = normal[:end][-1:] or self._before
        return shown

    def _with_unseen(self, shown: str, spans: Sequence[tuple[int, int]]) -> str:
        """What is shown with what was set aside of it; that within a word is masked like the word."""
        within = bytearray(max((self._covered, len(shown) + 1, *(last for _, last in spans))))
        within[: self._covered] = b"\1" * self._covered
        for first, last in spans:
            within[first + 1 : last] = b"\1" * (last - first - 1)
        parts, at, rest = list[str](), 0, dict[int, list[str]]()
        for place, chars in self._unseen.items():  # in order, as they came
            if place > len(shown):
                rest[place - len(shown)] = chars
            else:
                parts += [shown[at:place], MASK * len(chars) if within[place] else "".join(chars)]
                at = place
        self._unseen = rest
        return "".join([*parts, shown[at:]])


def _in_text(found: Iterable[tuple[int, int]], origin: range | list[int]) -> list[tuple[int, int]]:
    """Spans of the normal form as spans of the text."""
    return [(origin[first], origin[end - 1] + 1) for first, end in found]


def _covered(text: str, spans: Iterable[tuple[int, int]]) -> str:
    chars = list(text)
    for first, end in spans:
        chars[first:end] = MASK * (end - first)
    return "".join(chars)
