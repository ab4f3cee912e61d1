"""What a person types into the terminal chat: with line editing and history if `prompt_toolkit` is installed."""

import asyncio
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imstream.cli.terminal import LineReader, TerminalOutput

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, MORE = "> ", "… "
MAX_HISTORY_FILE = 1 << 20
"""Maximum size in bytes of the history file; a larger one is started again."""


class Keyboard(Protocol):
    """Reads messages."""

    async def read(self) -> str | None:
        """The next message, of one or several lines; None at the end of the input."""


def open_keyboard(output: TerminalOutput, on_ctrl_c: Callable[[], None]) -> Keyboard:
    """The best keyboard here. `on_ctrl_c` handles Ctrl-C while no message is read, and with `LineKeyboard` always."""
    if output.is_live and os.environ.get("TERM", "dumb") != "dumb":
        with suppress(ImportError):
            return EditingKeyboard(on_ctrl_c)
    return LineKeyboard(output, on_ctrl_c)


class LineKeyboard:
    """Reads lines as the terminal edits them. A line that ends with a backslash goes on in the next one."""

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
        finally:
            loop.add_signal_handler(signal.SIGINT, self._on_ctrl_c)

    async def _read(self, interrupted: asyncio.Event) -> str | None:
        lines = list[str]()
        while True:
            self._output.prompt(MORE if lines else PROMPT)
            reading, cleared = asyncio.create_task(self._reader.readline()), asyncio.create_task(interrupted.wait())
            await asyncio.wait({reading, cleared}, return_when=asyncio.FIRST_COMPLETED)
            cleared.cancel()
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})
                interrupted.clear()
                lines.clear()
                self._output.end_line()
                continue
            if (line := reading.result()) is None:
                return None
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)


class EditingKeyboard:
    """Reads messages with `prompt_toolkit`, below what is written meanwhile."""

    def __init__(self, on_ctrl_c: Callable[[], None]) -> None:
        from prompt_toolkit import PromptSession  # noqa: PLC0415 - optional

        self._on_ctrl_c = on_ctrl_c
        self._session: PromptSession[str] = PromptSession(
            PROMPT, multiline=True, prompt_continuation=MORE, key_bindings=_keys(), history=_history()
        )

    async def read(self) -> str | None:
        """See `Keyboard.read`."""
        from prompt_toolkit.patch_stdout import patch_stdout  # noqa: PLC0415 - optional

        while True:
            try:
                with patch_stdout(raw=True):
                    return await self._session.prompt_async()
            except KeyboardInterrupt:  # SIGINT from elsewhere
                continue
            except EOFError:
                return None
            finally:  # prompt_toolkit has removed it
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._on_ctrl_c)


def _keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings  # noqa: PLC0415 - optional

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def clear(event: "KeyPressEvent") -> None:
        event.current_buffer.reset()

    return keys


def _history() -> "History":
    """The history of earlier sessions, in a file that only this user can read; else of this session."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415 - optional

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "imstream"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / "chat_history"
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        if file.stat().st_size > MAX_HISTORY_FILE:
            file.write_text("")
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(str(file))


@contextmanager
def without_echo() -> Iterator[None]:
    """Do not show what is typed between two messages; it belongs to the next one."""
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
