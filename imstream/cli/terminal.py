"""Input and output of the terminal chat, on a terminal, pipes or files."""

import asyncio
import codecs
import os
import sys
import unicodedata

CHUNK = 65536  # maximum number of bytes read at once; the rest stays in the kernel, which blocks the writer

_DIRECTIONS = (*range(0x202A, 0x202F), 0x2066, 0x2067)
"""Characters that embed or override text directions (Unicode Standard Annex 9), and so reorder the rest of the line."""

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS) if chr(code) not in "\n\t"}
"""Control characters. Text from the wire must not move the cursor, reorder a line or send commands to the terminal."""

_FIRST_STRONG_ISOLATE, _POP_DIRECTIONAL_ISOLATE = "\u2068", "\u2069"
_ISOLATES = {ord(_FIRST_STRONG_ISOLATE): None, ord(_POP_DIRECTIONAL_ISOLATE): None}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def isolate_direction(text: str) -> str:
    """Enclose text for the middle of a line so that right-to-left text does not reorder the rest of the line."""
    if all(unicodedata.bidirectional(char) not in {"R", "AL"} for char in text):
        return text
    return f"{_FIRST_STRONG_ISOLATE}{text.translate(_ISOLATES)}{_POP_DIRECTIONAL_ISOLATE}"


class TerminalOutput:
    """Writes answers to standard output and notes to standard error.

    Answers are written as they arrive only on a terminal. Elsewhere the text of an attempt that is discarded later
    would be part of the output, so each answer is written when it is complete.
    """

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._within_line = False

    def prompt(self) -> None:
        """Write the prompt."""
        if self._live:
            self._write("> ")
            self._within_line = False  # the user's Enter ends it

    def write_piece(self, text: str) -> None:
        """Write text of an answer that is still being generated."""
        if self._live and text:
            self._write(text.translate(_CONTROL))
            self._within_line = not text.endswith("\n")

    def end_answer(self, text: str) -> None:
        """End an answer; `text` is all of it."""
        if not self._live:
            self._write(text.translate(_CONTROL) + "\n")
        self._end_line()

    def note(self, text: str) -> None:
        """Write a note on a line of its own."""
        self._end_line()
        text = text.translate(_CONTROL)
        sys.stderr.write(f"{_DIM}{text}{_RESET}\n" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """End the line of the prompt, so that the shell's prompt begins a new one."""
        if self._live:
            self._write("\n")

    def _end_line(self) -> None:
        if self._within_line:
            self._write("\n")
            self._within_line = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class LineReader:
    """Reads a file descriptor line by line without blocking the event loop, and only while a line is awaited.

    Standard input is not made non-blocking: a terminal shares that flag with standard output and with the shell.
    Instead it is read when the event loop reports data. Files cannot be polled, but never block.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self._ended = False

    async def readline(self) -> str | None:
        """The next line without its end; None at the end of the input. Cancelling loses nothing."""
        while "\n" not in self._text and not self._ended:
            await self._wait_readable()
            data = os.read(self._descriptor, CHUNK)
            self._ended = not data
            self._text += self._decoder.decode(data, final=self._ended)
        if not self._text:
            return None
        line, _, self._text = self._text.partition("\n")
        return line.removesuffix("\r")

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except PermissionError:  # epoll does not support files
            return
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)
