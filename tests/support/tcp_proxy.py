"""A TCP proxy whose connections a test can break, silence and delay. It runs in the test's own event loop.

A network never loses bytes from the middle of a connection: what is lost is all that would have come after. So a
connection that loses something stays silent for ever, in that direction, and both its ends still believe in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from tests.support.servers import USER

CHUNK = 65536


class Fate(StrEnum):
    """What becomes of an answer."""

    SILENCE = "silence"
    """It is lost, with all that follows on its connection."""
    DELAY = "delay"
    """It comes late, and what follows comes after it."""
    CUT = "cut"
    """It is lost, and the connection breaks."""


@dataclass
class Trap:
    """Waits for bytes that pass, and springs once.

    Attributes:
        parts: Bytes that all stand in one piece that is read, in any order.
        delay: Seconds, for `Fate.DELAY`.
        sprung: Whether the bytes have come.
    """

    parts: tuple[bytes, ...]
    fate: Fate
    delay: float = 0.0
    sprung: bool = False

    def springs(self, data: bytes) -> bool:
        """Whether this piece is the one."""
        if not self.sprung and all(part in data for part in self.parts):
            self.sprung = True
            return True
        return False


class TcpProxy:
    """Forwards bytes both ways.

    Attributes:
        port: Where it listens.
        target_port: Where new connections go.
        accepted: Connections so far.
        delay: Seconds by which everything from the server comes late.
    """

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.accepted = 0
        self.delay = 0.0
        self.target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._swallowing = False
        self._answers: list[Trap] = []
        self._questions: list[Trap] = []

    @property
    def url(self) -> str:
        """Its URL when the server is a Redis, for a node."""
        return f"redis://{USER}@127.0.0.1:{self.port}/0"

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._writers) // 2

    def drop(self) -> None:
        """Break every connection, as a lost network does: without a word, in both directions."""
        for writer in self._writers:
            writer.transport.abort()

    def swallow(self) -> None:
        """From now on nothing gets through, in either direction, on connections old and new."""
        self._swallowing = True

    def forward(self) -> None:
        """New connections work again. Those that lost something stay half-open: silent, and never closed."""
        self._swallowing = False

    def on_answer(self, *parts: bytes, fate: Fate, delay: float = 0.0) -> Trap:
        """The next answer with these bytes meets this fate."""
        self._answers.append(trap := Trap(parts, fate, delay))
        return trap

    def on_answer_to(self, *parts: bytes, fate: Fate, delay: float = 0.0) -> Trap:
        """The next question with these bytes reaches the server, and its answer meets this fate."""
        self._questions.append(trap := Trap(parts, fate, delay))
        return trap

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        both = {writer}
        self._writers |= both
        try:
            onward_reader, onward = await asyncio.open_connection("127.0.0.1", self.target_port)
            both.add(onward)
            self._writers.add(onward)
            connection = _Connection()
            await asyncio.gather(self._ask(reader, onward, connection), self._answer(onward_reader, writer, connection))
        except (OSError, asyncio.CancelledError):
            pass  # nobody listens there, or the proxy is closed
        finally:
            self._writers -= both
            self._tasks.discard(task)
            for one in both:
                one.transport.abort()

    async def close(self) -> None:
        """Break all connections, and see them end."""
        self.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection) -> None:
        try:
            while data := await reader.read(CHUNK):
                if self._swallowing or connection.deaf:
                    connection.deaf = True
                    continue
                for trap in self._questions:
                    if trap.springs(data):
                        connection.fate = trap
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                if self._swallowing or connection.mute:
                    connection.mute = True
                    continue
                trap, connection.fate = connection.fate, None
                trap = next((one for one in self._answers if one.springs(data)), trap)
                if trap is not None and trap.fate is Fate.CUT:
                    break
                if trap is not None and trap.fate is Fate.SILENCE:
                    connection.mute = True
                    continue
                await asyncio.sleep(self.delay if trap is None else trap.delay)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()


@dataclass
class _Connection:
    """What became of one connection: `deaf` when the server hears nothing more, `mute` when it is not heard."""

    deaf: bool = False
    mute: bool = False
    fate: Trap | None = None
    """Of the next answer."""


@asynccontextmanager
async def tcp_proxy(target_port: int) -> AsyncIterator[TcpProxy]:
    """A proxy on a free port of 127.0.0.1."""
    proxy = TcpProxy(target_port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
