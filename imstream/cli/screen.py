"""What a person sees of a chat: answers on standard output, everything else on standard error."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

_DIRECTIONS = (*range(0x202A, 0x202F), 0x2066, 0x2067)
"""Characters that embed or override directions (Unicode Standard Annex 9): up to the end of the line, whatever stands
in it would be shown in another order than it is written."""

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS) if chr(code) not in "\n\t"}
"""Control characters. Nothing that comes over the wire may move the cursor, turn a line or talk to the terminal."""

_FIRST_STRONG_ISOLATE, _POP_DIRECTIONAL_ISOLATE = "\u2068", "\u2069"
_RIGHT_TO_LEFT = frozenset({"R", "AL"})
_ISOLATES = {ord(_FIRST_STRONG_ISOLATE): None, ord(_POP_DIRECTIONAL_ISOLATE): None}

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def isolated(text: str) -> str:
    """A text that somebody else wrote, for the middle of a line of ours: one written from right to left leaves the rest
    of the line in its order."""  # noqa: D205, D209 - one thought
    if all(unicodedata.bidirectional(one) not in _RIGHT_TO_LEFT for one in text):
        return text
    return f"{_FIRST_STRONG_ISOLATE}{text.translate(_ISOLATES)}{_POP_DIRECTIONAL_ISOLATE}"


class Screen:
    """Writes to a terminal, or to files and pipes.

    Answers are shown as they come only on a terminal: elsewhere the text of an attempt that was given up could not be
    told from the answer, so there each answer is written when it is whole.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self.live = self._out.isatty()
        self._within_line = False

    def prompt(self) -> None:
        """Ask for a line."""
        if self.live:
            self._write("> ")
            self._within_line = False  # the person's Enter ends it

    def piece(self, text: str) -> None:
        """Show text of an answer as it comes."""
        if self.live and text:
            self._write(text.translate(_CONTROL))
            self._within_line = not text.endswith("\n")

    def whole(self, text: str) -> None:
        """An answer is complete."""
        if not self.live:
            self._write(text.translate(_CONTROL) + "\n")
        self.end_line()

    def note(self, text: str) -> None:
        """Say something that is no part of an answer, on a line of its own."""
        self.end_line()
        text = text.translate(_CONTROL)
        self._err.write(f"{_DIM}{text}{_PLAIN}\n" if self._err.isatty() else f"{text}\n")
        self._err.flush()

    def goodbye(self) -> None:
        """The chat is over: leave the shell a line of its own."""
        if self.live:
            self._write("\n")

    def end_line(self) -> None:
        """End the line of an answer that was begun."""
        if self._within_line:
            self._write("\n")
            self._within_line = False

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
