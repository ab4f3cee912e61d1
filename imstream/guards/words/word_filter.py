"""Search and masking of listed words, in whole texts and in answers that are still being streamed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from imstream.guards.guard import GuardRejection, Reject
from imstream.guards.words.normalization import IGNORED, last_letter, normalize, source_indexes, strip_ignored
from imstream.guards.words.word_list import WordList

MASK = "＊"  # for each character of a word, and each separator in it; of full width, because `*` is Markdown


def has_word(text: str, words: WordList) -> bool:
    """Whether a text contains a listed word."""
    return next(words.find(strip_ignored(normalize(text))), None) is not None


def mask(text: str, words: WordList) -> str:
    """Mask the listed words of a text."""
    normal = normalize(text)
    found = list(words.find(strip_ignored(normal)))
    if not found:
        return text
    indexes = [at for at, part in zip(source_indexes(text, normal), normal, strict=True) if part != IGNORED]
    return _masked(text, _spans_in_text(found, indexes))


@dataclass(slots=True, repr=False)
class WordFilter:
    """An `AnswerFilter` that masks or rejects listed words. Only a possible beginning of a word is buffered.

    Ignored characters are stored apart: a word may contain any number of them, and each must cost only its length.
    """

    words: WordList
    rejection: Reject | None  # None: words are masked

    _buffer: str = ""
    _normal: str = ""  # the buffer, normalized
    _ignored: dict[int, list[str]] = field(default_factory=dict)  # by the index in the buffer before which they belong
    _masked: int = 0  # characters at the start of the buffer that belong to a word that began earlier
    _before: str = ""  # the normalized character before the buffer
    _last_letter: str = ""

    def feed(self, text: str) -> str:
        normal = normalize(text, after=self._last_letter)
        self._last_letter = last_letter(normal) or self._last_letter
        if IGNORED in normal:
            text, normal = self._set_ignored_apart(text, normal)
            if not text and self._buffer:
                return ""
        text, normal = self._buffer + text, self._normal + normal
        end, may_match = self.words.pending_start(normal, before=self._before)
        if may_match or self._masked or len(normal) != len(text):
            return self._release(text, normal, end)
        shown, self._buffer, self._normal = text[:end], text[end:], normal[end:]
        self._before = normal[:end][-1:] or self._before
        return self._insert_ignored(shown, ()) if self._ignored else shown

    def seed(self, shown: str) -> int | None:
        if self.rejection is None and MASK in shown:
            return None  # the model wrote something else
        passed = self.feed(shown)
        held = len(shown) - len(passed)
        return held if shown.startswith(passed) and (held == 0 or self.rejection is not None) else None

    def end(self) -> str:
        return self._release(self._buffer, self._normal, len(self._normal)) if self._buffer else ""

    def _set_ignored_apart(self, text: str, normal: str) -> tuple[str, str]:
        """Return the text and its normalized form without ignored characters."""
        visible, length, at = list[str](), len(self._buffer), 0
        indexes = source_indexes(text, normal)
        for place in dict.fromkeys(indexes[number] for number, part in enumerate(normal) if part == IGNORED):
            visible.append(text[at:place])
            length += place - at
            self._ignored.setdefault(length, []).append(text[place])
            at = place + 1
        return "".join([*visible, text[at:]]), strip_ignored(normal)

    def _release(self, text: str, normal: str, end: int) -> str:
        """Return the text up to `end`, an index of `normal`, and buffer the rest. Raises `GuardRejection`."""
        indexes = source_indexes(text, normal)
        cut = indexes[end] if end < len(normal) else len(text)
        while end > 0 and indexes[end - 1] == cut:  # `end` is within the form of one character: buffer all of it
            end -= 1
        # Words that begin at `end` or later may be incomplete: they are found again.
        found = [span for span in self.words.find(normal, before=self._before) if span[0] < end]
        if found and self.rejection is not None:
            raise GuardRejection(self.rejection)
        spans = _spans_in_text(found, indexes)
        shown = _masked(text, [(0, self._masked), *spans])[:cut] if found or self._masked else text[:cut]
        if self._ignored:
            shown = self._insert_ignored(shown, spans)
        self._masked = max(0, self._masked - cut, *(last - cut for _, last in spans))
        self._buffer, self._normal = text[cut:], normal[end:]
        self._before = normal[:end][-1:] or self._before
        return shown

    def _insert_ignored(self, shown: str, spans: Sequence[tuple[int, int]]) -> str:
        """Insert the ignored characters into the text to be shown; those within a word are masked, too."""
        within = bytearray(max((self._masked, len(shown) + 1, *(last for _, last in spans))))
        within[: self._masked] = b"\1" * self._masked
        for first, last in spans:
            within[first + 1 : last] = b"\1" * (last - first - 1)
        parts, at, rest = list[str](), 0, dict[int, list[str]]()
        for place, chars in self._ignored.items():  # in ascending order
            if place > len(shown):
                rest[place - len(shown)] = chars
            else:
                parts += [shown[at:place], MASK * len(chars) if within[place] else "".join(chars)]
                at = place
        self._ignored = rest
        return "".join([*parts, shown[at:]])


def _spans_in_text(found: Iterable[tuple[int, int]], indexes: range | list[int]) -> list[tuple[int, int]]:
    return [(indexes[first], indexes[end - 1] + 1) for first, end in found]


def _masked(text: str, spans: Iterable[tuple[int, int]]) -> str:
    chars = list(text)
    for first, end in spans:
        chars[first:end] = MASK * (end - first)
    return "".join(chars)
