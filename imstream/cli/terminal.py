"""Output of the terminal chat, on a terminal, pipes or files; and its input where there is no line editor."""

import asyncio
import codecs
import os
import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imstream.cli.chat_markdown import MarkdownRenderer

CHUNK = 65536  # maximum number of bytes read at once; the rest stays in the kernel, which blocks the writer

_DIRECTIONS = (*range(0x202A, 0x202F), 0x2066, 0x2067)
"""Characters that embed or override text directions (Unicode Standard Annex 9), and so reorder the rest of the line."""

_DIRECTIONS_REMOVED = dict.fromkeys(_DIRECTIONS)
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS) if chr(code) not in "\n\t"}
"""Control characters. Text from the wire must not move the cursor, reorder a line or send commands to the terminal."""

_FIRST_STRONG_ISOLATE, _POP_DIRECTIONAL_ISOLATE = "\u2068", "\u2069"
_ISOLATES = {ord(_FIRST_STRONG_ISOLATE): None, ord(_POP_DIRECTIONAL_ISOLATE): None}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def printable(text: str) -> str:
    """Text without control characters."""
    return text.translate(_CONTROL)


def without_directions(text: str) -> str:
    """Text without characters that reorder a line. Escape sequences stay."""
    return text.translate(_DIRECTIONS_REMOVED)


def isolate_direction(text: str) -> str:
    """Enclose text for the middle of a line so that right-to-left text does not reorder the rest of the line."""
    if all(unicodedata.bidirectional(char) not in {"R", "AL"} for char in text):
        return text
    return f"{_FIRST_STRONG_ISOLATE}{text.translate(_ISOLATES)}{_POP_DIRECTIONAL_ISOLATE}"


def shorten(text: str, columns: int) -> str:
    """The first line of a text, cut to so many columns of a terminal."""
    text, used = printable(text).partition("\n")[0].replace("\t", " "), 0
    for index, char in enumerate(text):
        used += 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1
        if used > columns:
            return text[: max(0, index - 1)] + "…"
    return text


class TerminalOutput:
    """Writes answers to standard output and notes to standard error.

    Answers are written as they arrive only on a terminal. Elsewhere the text of an attempt that is discarded later
    would be part of the output, so each answer is written when it is complete.

    The last lines on a terminal may change: the part of an answer whose Markdown is not complete, and the status. They
    are erased and written again; lines that would not fit the screen are left as they are.
    """

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # locales that are not UTF-8
        self.is_live = sys.stdout.isatty()
        self._markdown = _markdown_renderer() if self.is_live else None
        self._within_line = False
        self._status = ""
        self._block = ""
        self._left = 0  # lines of the block that are left as they are
        self._changing = 0  # lines at the end of the screen that are written again

    def write_piece(self, text: str) -> None:
        """Write text of an answer that is still being generated."""
        text = printable(text)
        if not self.is_live or not text:
            return
        self._status = ""
        if self._markdown is None:
            self._redraw()
            self._write(text)
            self._within_line = not text.endswith("\n")
        else:
            finished, self._block = self._markdown.split(self._block + text)
            self._redraw(finished)

    def end_answer(self, text: str = "") -> None:
        """End an answer, or an attempt; `text` is all of it."""
        block, self._block, self._status = self._block, "", ""
        self._redraw(block if block.strip() else "")
        if self._markdown is not None:
            self._markdown.begin()
        if text and not self.is_live:
            self._write(printable(text) + "\n")
        self._end_line()

    def status(self, text: str) -> None:
        """Show the state of a message in the last line, in place of the one before."""
        if self.is_live and text != self._status and not self._within_line:
            self._status = text
            self._redraw()

    def note(self, text: str) -> None:
        """Write a note on lines of its own."""
        self._erase()
        self._end_line()
        text = printable(text)
        sys.stderr.write(f"{_DIM}{text}{_RESET}\n" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()
        self._redraw()

    def prompt(self, text: str) -> None:
        """Write the prompt of a terminal without a line editor."""
        if self.is_live:
            self._write(text)
            self._within_line = False  # the user's Enter ends it

    def end_line(self) -> None:
        """End the line of the prompt, so that what follows begins a new one."""
        if self.is_live:
            self._write("\n")

    def command(self, sequence: str) -> None:
        """Send an escape sequence to the terminal."""
        if self.is_live:
            self._write(sequence)

    def _redraw(self, finished: str = "") -> None:
        self._erase()
        columns, height = shutil.get_terminal_size()
        lines = list[str]()
        if self._markdown is not None and finished:
            lines += self._markdown.lines(finished)[self._left :]
            self._left = 0
            self._markdown.begin(follows=True)
        stay = len(lines)
        if self._markdown is not None and self._block.strip():
            block = self._markdown.lines(self._block)[self._left :]
            beyond = max(0, len(block) - height + 2)
            self._left, stay, lines = self._left + beyond, stay + beyond, lines + block
        if self._status:
            lines.append(f"{_DIM}{shorten(self._status, columns - 1)}{_RESET}")
        if lines:
            self._write("".join(f"{line}\n" for line in lines))
        self._changing = len(lines) - stay

    def _erase(self) -> None:
        if self._changing:
            self._write(f"\x1b[{self._changing}F\x1b[J")
            self._changing = 0

    def _end_line(self) -> None:
        if self._within_line:
            self._write("\n")
            self._within_line = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _markdown_renderer() -> "MarkdownRenderer | None":
    """The renderer; None without the package `rich`, or on a terminal without escape sequences."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        from imstream.cli.chat_markdown import MarkdownRenderer  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return MarkdownRenderer()


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
