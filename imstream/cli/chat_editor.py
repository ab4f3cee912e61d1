"""The line editor of the terminal chat, with the optional package `prompt_toolkit`."""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout

from imstream.cli.terminal_text import valid

MAX_HISTORY_FILE = 1 << 20  # maximum size in bytes of the history file; a larger one is started again


class EditingKeyboard:
    """Reads messages below text that is written meanwhile. `on_ctrl_c` handles Ctrl-C while no message is read."""

    def __init__(self, prompt: str, more: str, on_ctrl_c: Callable[[], None]) -> None:
        self._on_ctrl_c = on_ctrl_c
        self._session = PromptSession[str](
            prompt,
            multiline=True,
            prompt_continuation=more,
            enable_suspend=True,
            key_bindings=_keys(),
            history=_history(),
        )

    async def read(self) -> str | None:
        """See `chat_input.Keyboard.read`."""
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


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=~is_searching)
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


class _History(FileHistory):
    """Earlier messages in a file. A chat continues when the file cannot be written."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(valid(string))


def _history() -> History:
    """The history of earlier sessions, in a file that only this user can read; else of this session."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "imstream"
    file = folder / "chat_history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600), "wb") as opened:
            os.fchmod(opened.fileno(), 0o600)
            if os.fstat(opened.fileno()).st_size > MAX_HISTORY_FILE:
                opened.truncate()
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return _History(str(file))
