"""The terminal client in its own process, on a real terminal or on pipes."""

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.waiting import SLOW, wait_until

_PROGRAM = """
import os, sys
if os.isatty(0):
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal: Ctrl-C reaches this process
from datetime import timedelta
from imstream.client import Timing
from imstream.cli.chat_terminal import run
sys.exit(run(sys.argv[1], 10001, None, sys.argv[2], timing=Timing(open=timedelta(seconds=float(sys.argv[3])))))
"""

CTRL_C, CTRL_D = "\x03", "\x04"


def command(url: str, *, lang: str = "en", patience: float = 10) -> list[str]:
    """The command line of a chat. `patience` limits the first login in seconds."""
    return [sys.executable, "-c", _PROGRAM, url, lang, str(patience)]


async def piped(url: str, text: str, *, lang: str = "en", patience: float = 10) -> tuple[int, str, str]:
    """Chat with input from a pipe. Return exit code, standard output and standard error."""
    line = command(url, lang=lang, patience=patience)
    process = await asyncio.create_subprocess_exec(*line, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    out, err = await asyncio.wait_for(process.communicate(text.encode()), 20 * SLOW)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


class Terminal:
    """The screen and the keyboard of a terminal client."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self.process = process
        self.seen = ""
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._descriptor, text.encode())

    async def shows(self, text: str) -> None:
        """Wait for a text on the screen, and forget everything before it."""
        await wait_until(lambda: text in self.seen, f"{text!r} on the screen")
        self.seen = self.seen.partition(text)[2]

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
        self.seen += re.sub(r"\x1b\[\d*m", "", data.decode()).replace("\r\n", "\n")


@asynccontextmanager
async def at_terminal(url: str) -> AsyncIterator[Terminal]:
    """Start a chat on a terminal."""
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *command(url), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    terminal = Terminal(process, ours)
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
