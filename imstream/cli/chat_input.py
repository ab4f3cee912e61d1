"""Input of the terminal chat: with line editing and history if `prompt_toolkit` is installed."""

import asyncio
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from imstream.cli.racing import completes_first
from imstream.cli.terminal import LineReader, TerminalOutput

PROMPT, MORE = "> ", "… "


class Keyboard(Protocol):
    """Reads messages."""

    async def read(self) -> str | None:
        """The next message, of one or several lines; None at the end of the input."""


def open_keyboard(output: TerminalOutput, on_ctrl_c: Callable[[], None]) -> Keyboard:
    """The best keyboard here. `on_ctrl_c` handles Ctrl-C while no message is read, and with `LineKeyboard` always."""
    if output.can_redraw:
        with suppress(ImportError):
            from imstream.cli.chat_editor import EditingKeyboard  # noqa: PLC0415 - optional

            return EditingKeyboard(PROMPT, MORE, on_ctrl_c)
    return LineKeyboard(output, on_ctrl_c)


class LineKeyboard:
    """Reads lines as the terminal edits them. A line that ends with a backslash continues in the next one."""

    def __init__(self, output: TerminalOutput, on_ctrl_c: Callable[[], None]) -> None:
        self._output = output
        self._reader = LineReader(sys.stdin.fileno())
        self._on_ctrl_c = on_ctrl_c

    async def read(self) -> str | None:
        """See `Keyboard.read`."""
        loop = asyncio.get_running_loop()
        interrupted = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, interrupted.set)
        try:
            return await self._read(interrupted)
        except asyncio.CancelledError:
            self._output.end_line()
            raise
        finally:
            self._output.prompt("")
            loop.add_signal_handler(signal.SIGINT, self._on_ctrl_c)

    async def _read(self, interrupted: asyncio.Event) -> str | None:
        lines = list[str]()
        while True:
            self._output.prompt(MORE if lines else PROMPT)
            reading = asyncio.create_task(self._reader.readline())
            if not await completes_first(reading, interrupted.wait()):
                interrupted.clear()
                lines.clear()
                self._output.end_line()
                continue
            if (line := reading.result()) is None:
                return None
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)


@contextmanager
def without_echo() -> Iterator[None]:
    """Hide input between two messages; it belongs to the next one."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, ValueError):
        yield
        return
    changed = list(before)
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
