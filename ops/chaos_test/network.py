"""The network between clients and servers: it breaks connections and checks the frames of the servers."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from imstream.user_ids import UserId
from ops.chaos_test.history import Complaint
from ops.chaos_test.tap import Tap

_CHUNK = 65536


class Network:
    """A TCP proxy that all clients connect to. A context manager.

    Args:
        choose: Returns the port on 127.0.0.1 for the next connection.

    Attributes:
        port: The port that clients connect to.
        complaints: Frames that servers must not send.
        accepted: When `accepted` was first sent for each user and message id (time of the event loop).
    """

    def __init__(self, choose: Callable[[], int]) -> None:
        self.port = 0
        self.complaints: list[Complaint] = []
        self.accepted: dict[tuple[UserId, str], float] = {}
        self._choose = choose
        self._server: asyncio.Server | None = None
        self._connections: dict[int, list[asyncio.StreamWriter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None  # noqa: S101 - set on entering
        self._server.close()
        for number in list(self._connections):
            self._abort(number)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop(self, which: int) -> bool:
        """Break one of the connections; False without a connection."""
        if not self._connections:
            return False
        numbers = list(self._connections)
        self._abort(numbers[which % len(numbers)])
        return True

    def _abort(self, number: int) -> None:
        for writer in self._connections.get(number, ()):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of asyncio
        self._tasks.add(task)
        self._count += 1
        number, both = self._count, [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._choose())
            both.append(server_writer)
            self._connections[number] = both
            tap = Tap(self.complaints.append, self._note_accepted)
            to_server = asyncio.create_task(_forward(reader, server_writer, tap.feed_client))
            to_client = asyncio.create_task(_forward(server_reader, writer, tap.feed))
            try:
                # The last frames of a server before it closes must be delivered, so its side ends the connection.
                await asyncio.wait([to_server, to_client], return_when=asyncio.FIRST_COMPLETED)
            finally:
                to_server.cancel()
                to_client.cancel()
                await asyncio.gather(to_server, to_client, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # refused, or the end of the run; asyncio would log a cancelled connection
        finally:
            self._connections.pop(number, None)
            for one in both:
                one.close()
            self._tasks.discard(task)

    def _note_accepted(self, user_id: UserId, message_id: str) -> None:
        self.accepted.setdefault((user_id, message_id), asyncio.get_running_loop().time())


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, feed: Callable[[bytes], None]) -> None:
    try:
        while data := await reader.read(_CHUNK):
            feed(data)
            writer.write(data)
            await writer.drain()
    except OSError:
        return
