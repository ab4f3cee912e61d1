"""Output of the terminal chat, on a terminal, pipes or files; and its input where there is no line editor."""

import asyncio
import codecs
import os
import shutil
import sys
from contextlib import suppress

from imstream.cli.terminal_text import printable, rows, shorten

CHUNK = 65536  # maximum number of bytes read at once; the rest stays in the kernel, which blocks the writer

_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class TerminalOutput:
    """Writes answers to standard output and notes to standard error.

    Answers are written as they arrive only on a terminal. Elsewhere the text of an attempt that is discarded later
    would be part of the output, so each answer is written when it is complete.

    The last lines on a terminal may change: the part of an answer whose Markdown is not complete, and the status. They
    are erased and written again; lines that would not fit the screen are left as they are.
    """

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # locales that are not UTF-8
        has_sequences = os.environ.get("TERM", "dumb") != "dumb"
        self.is_live = sys.stdout.isatty()  # whether answers are written as they arrive
        self.can_redraw = self.is_live and has_sequences  # else there is neither Markdown nor a status
        self._note_format = f"{_DIM}{{}}{_RESET}\n" if has_sequences and sys.stderr.isatty() else "{}\n"
        self._markdown = None
        if self.can_redraw:
            with suppress(ImportError):
                from imstream.cli.chat_markdown import MarkdownRenderer  # noqa: PLC0415 - optional

                self._markdown = MarkdownRenderer()
        self._within_line = False
        self._prompt = ""
        self._status = ""
        self._block = ""
        self._left = 0  # lines of the block that are left as they are
        self._changing = list[str]()  # lines at the end of the screen that are written again

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

    def status(self, text: str) -> bool:
        """Show the state of a message in the last line, in place of the one before; False if that is not possible."""
        is_possible = self.can_redraw and not self._within_line
        if is_possible and text != self._status:
            self._status = text
            self._redraw()
        return is_possible

    def note(self, text: str) -> None:
        """Write a note on lines of its own, and the prompt again if it waits for a line."""
        self._erase()
        self._within_line |= bool(self._prompt)
        self._end_line()
        sys.stderr.write(self._note_format.format(printable(text)))
        sys.stderr.flush()
        self._redraw()
        self.prompt(self._prompt)

    def prompt(self, text: str) -> None:
        """Write the prompt of a terminal without a line editor; an empty one after the line was read."""
        if self.is_live:
            self._prompt = text
            self._write(text)

    def end_line(self) -> None:
        """End the line of the prompt, so that later output begins a new one."""
        if self.is_live:
            self._write("\n")

    def command(self, sequence: str) -> bool:
        """Send an escape sequence to the terminal, if it executes them."""
        if self.can_redraw:
            self._write(sequence)
        return self.can_redraw

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
        self._changing = lines[stay:]

    def _erase(self) -> None:
        if self._changing:  # lines wrap when a window becomes narrower
            columns = shutil.get_terminal_size().columns
            self._write(f"\x1b[{sum(rows(line, columns) for line in self._changing)}F\x1b[J")
            self._changing = []

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
