"""Lines from standard input, without blocking the event loop, from a terminal, a pipe or a file alike."""

from __future__ import annotations

import asyncio
import codecs
import os

CHUNK = 65536
"""Most bytes taken from standard input at once. What comes early waits in the kernel, which holds the writer back."""


class Keyboard:
    """Reads a file descriptor line by line, and only when a line is asked for.

    Standard input is not made non-blocking: on a terminal it shares its state with standard output, and with the
    shell. Instead it is read when the loop says that there is something. The kernel cannot say so of files, which
    never block.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self._ended = False

    async def line(self) -> str | None:
        """The next line without its end; None when there is no more. May be cancelled without losing anything."""
        while "\n" not in self._text and not self._ended:
            await self._readable()
            data = os.read(self._descriptor, CHUNK)
            self._ended = not data
            self._text += self._decoder.decode(data, final=self._ended)
        if not self._text:
            return None
        line, _, self._text = self._text.partition("\n")
        return line.removesuffix("\r")

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except PermissionError:  # epoll does not take files
            return
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)
