"""Commands in their own process, on a terminal with a screen, or on pipes."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from fcntl import ioctl
from struct import pack
from termios import TIOCSWINSZ

import pyte

from imstream.client import Turn
from tests.support.scripted_ws import Peer, ScriptedServer
from tests.support.waiting import SLOW, wait_until

_PROGRAM = """
import os, sys
if os.isatty(0):
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal: Ctrl-C reaches this process
for name in filter(None, os.environ.get("HIDDEN_MODULES", "").split()):
    sys.modules[name] = None  # as if it was not installed
"""

_CHAT = """
from datetime import timedelta
from imstream.client import Timing
from imstream.cli.chat_terminal import run
timing = Timing(open=timedelta(seconds=float(sys.argv[3])))
sys.exit(run(sys.argv[1], 10001, None, sys.argv[2], question=(sys.argv[4:] or [None])[0], timing=timing))
"""

_COMMAND = """
from imstream.cli.main import main
main(sys.argv[1:], prog_name="imstream")
"""

CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"

_OF_TERMINALS = {"COLUMNS", "LINES", "NO_COLOR", "TMUX", "DISPLAY", "WAYLAND_DISPLAY"}

WITHOUT_EXTRA = {"HIDDEN_MODULES": "rich prompt_toolkit"}
"""The environment of a program without the packages of the extra `terminal`."""


def command(url: str, *question: str, lang: str = "en", patience: float = 10) -> list[str]:
    """The command line of a chat. `patience` limits the first login in seconds."""
    return [sys.executable, "-c", _PROGRAM + _CHAT, url, lang, str(patience), *question]


def imstream(*arguments: str) -> list[str]:
    """The command line of any command."""
    return [sys.executable, "-c", _PROGRAM + _COMMAND, *arguments]


async def piped(url: str, text: str, *question: str, lang: str = "en", patience: float = 10) -> tuple[int, str, str]:
    """Chat with input from a pipe. Return exit code, standard output and standard error."""
    line = command(url, *question, lang=lang, patience=patience)
    process = await asyncio.create_subprocess_exec(*line, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    out, err = await asyncio.wait_for(process.communicate(text.encode()), 20 * SLOW)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


class Terminal:
    """The screen and the keyboard of a terminal with a program.

    Attributes:
        written: All that the program has written, with its escape sequences.
    """

    def __init__(self, process: Process, descriptor: int, size: tuple[int, int]) -> None:
        self.process = process
        self.written = ""
        self._screen = pyte.HistoryScreen(*size, history=10_000)
        self._screen.write_process_input = self.type  # type: ignore[method-assign, assignment] # answers questions
        self._stream = pyte.ByteStream(self._screen)
        self._descriptor = descriptor
        self._seen = 0

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._descriptor, text.encode("utf-8", "surrogateescape"))

    @property
    def text(self) -> str:
        """The lines scrolled out of the screen and those on it; lines end at their last visible character."""
        width = self._screen.columns
        above = ["".join(line[column].data for column in range(width)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in (*above, *self._screen.display)).rstrip()

    async def shows(self, text: str) -> None:
        """Wait for a text below the one waited for before, which must be there to stay."""
        await self._wait_for(text, self._seen)
        self._seen = self.text.find(text, self._seen) + len(text)

    async def has(self, text: str) -> None:
        """Wait for a text that may be replaced by another."""
        await self._wait_for(text, 0)

    async def _wait_for(self, text: str, start: int) -> None:
        try:
            await wait_until(lambda: self.text.find(text, start) >= 0, f"{text!r} on the screen")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.text}") from None

    async def exit_code(self) -> int:
        """Wait for the end."""
        return await asyncio.wait_for(self.process.wait(), 10 * SLOW)

    def read(self) -> None:
        """Read the output to the screen."""
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the process has closed the terminal
            asyncio.get_running_loop().remove_reader(self._descriptor)
            return
        self.written += data.decode(errors="replace")
        self._stream.feed(data)


@asynccontextmanager
async def at_terminal(
    line: Sequence[str], *, env: Mapping[str, str] | None = None, size: tuple[int, int] = (80, 24)
) -> AsyncIterator[Terminal]:
    """Start a command on a terminal with so many columns and lines."""
    ours, theirs = os.openpty()
    ioctl(theirs, TIOCSWINSZ, pack("HHHH", size[1], size[0], 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in _OF_TERMINALS}
    process = await asyncio.create_subprocess_exec(
        *line,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**environment, "TERM": "xterm-256color", "XDG_STATE_HOME": "/dev/null", **(env or {})},
    )
    os.close(theirs)
    terminal = Terminal(process, ours, size)
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, terminal.read)
    try:
        yield terminal
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
        loop.remove_reader(ours)
        os.close(ours)


async def answer(peer: Peer, text: str, **end: object) -> list[Turn]:
    """Answer the next message; returns its history. `end`: more fields of the last frame."""
    chat = await peer.hear_chat()
    await peer.send_chat(chat.message_id, "accepted", position=1)
    await peer.send_chat(chat.message_id, "delta", contents=text, attempt=1, offset=len(text))
    await peer.send_chat(chat.message_id, "done", attempt=1, offset=len(text), **end)
    return chat.history


async def greeted(server: ScriptedServer, terminal: Terminal) -> Peer:
    """Log the chat in and wait for its prompt; returns the server's end."""
    peer = await server.logged_in()
    await terminal.shows("Connected to ws://")
    await terminal.shows("\n>")
    return peer


async def half_an_answer(peer: Peer, terminal: Terminal) -> str:
    """Send a message and half of its answer; returns the message id."""
    terminal.type("hello\n")
    message_id = (await peer.hear_chat()).message_id
    assert message_id is not None
    await peer.send_chat(message_id, "accepted", position=1)
    await peer.send_chat(message_id, "delta", contents="half", attempt=1, offset=4)
    await terminal.shows("half")
    return message_id
