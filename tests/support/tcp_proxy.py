"""A TCP proxy in the test's event loop whose connections a test can break, silence and delay.

A network never loses bytes from the middle of a connection; everything after them is lost too. So a connection that
loses bytes stays silent in that direction, and neither end notices.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from tests.support.servers import USER

CHUNK = 65536


class Fate(StrEnum):
    """Faults in a server's answer."""

    SILENCE = "silence"
    """Lost, with everything after it on the connection."""
    DELAY = "delay"
    """Delayed, with everything after it."""
    CUT = "cut"
    """Lost, and the connection breaks."""


@dataclass
class Trap:
    """Matches passing bytes once.

    Attributes:
        parts: Byte strings that must all occur in one read, in any order.
        delay: Seconds, for `Fate.DELAY`.
        sprung: Whether the bytes have passed, or are held.
        released: For `hold`: set it to forward them.
    """

    parts: tuple[bytes, ...]
    fate: Fate
    delay: float = 0.0
    sprung: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def springs(self, data: bytes) -> bool:
        """Whether these bytes match for the first time."""
        if not self.sprung and all(part in data for part in self.parts):
            self.sprung = True
            return True
        return False


class TcpProxy:
    """Forwards bytes in both directions.

    Attributes:
        port: The port it listens on.
        target_port: The target of new connections.
        accepted: Connections so far.
        delay: Delay in seconds of everything from the server.
        swallowed: Bytes from clients that were dropped.
    """

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.accepted = 0
        self.delay = 0.0
        self.swallowed = 0
        self.target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._swallowing = False
        self._answers: list[Trap] = []
        self._questions: list[Trap] = []
        self._held: list[Trap] = []

    @property
    def url(self) -> str:
        """Its Redis URL for a node."""
        return f"redis://{USER}@127.0.0.1:{self.port}/0"

    @property
    def open(self) -> int:
        """Number of open connections."""
        return len(self._writers) // 2

    def drop(self) -> None:
        """Break every connection in both directions, as a lost network does."""
        for writer in self._writers:
            writer.transport.abort()

    def reset(self) -> None:
        """Break every connection with a reset, without its end."""
        for writer in self._writers:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.drop()

    def swallow(self) -> None:
        """Drop all bytes in both directions, on existing and new connections."""
        self._swallowing = True

    def forward(self) -> None:
        """Forward new connections again. Those that lost bytes stay half-open: silent and never closed."""
        self._swallowing = False

    def on_answer(self, *parts: bytes, fate: Fate, delay: float = 0.0) -> Trap:
        """Set the fate of the next answer with these bytes."""
        self._answers.append(trap := Trap(parts, fate, delay))
        return trap

    def on_answer_to(self, *parts: bytes, fate: Fate, delay: float = 0.0) -> Trap:
        """Set the fate of the answer to the next request with these bytes, which reaches the server."""
        self._questions.append(trap := Trap(parts, fate, delay))
        return trap

    def hold(self, *parts: bytes) -> Trap:
        """Hold the next request with these bytes, and forward it when it is released, even if its client has left."""
        self._held.append(trap := Trap(parts, Fate.DELAY))
        return trap

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until either side ends it."""
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
            pass  # the target does not listen, or the proxy is closed
        finally:
            self._writers -= both
            self._tasks.discard(task)
            for one in both:
                one.transport.abort()

    async def close(self) -> None:
        """Break all connections and wait for their end."""
        self.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: "_Connection") -> None:
        try:
            while data := await reader.read(CHUNK):
                if self._swallowing or connection.deaf:
                    connection.deaf = True
                    self.swallowed += len(data)
                    continue
                for trap in self._questions:
                    if trap.springs(data):
                        connection.fate = trap
                if (held := next((one for one in self._held if one.springs(data)), None)) is not None:
                    await held.released.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: "_Connection"
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
    """State of one connection: `deaf` drops bytes to the server, `mute` drops bytes from it."""

    deaf: bool = False
    mute: bool = False
    fate: Trap | None = None
    """The fate of the next answer."""


@asynccontextmanager
async def tcp_proxy(target_port: int) -> AsyncIterator[TcpProxy]:
    """Run a proxy on a free port of 127.0.0.1."""
    proxy = TcpProxy(target_port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
