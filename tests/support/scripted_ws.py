"""A WebSocket server whose frames the test writes, over a real socket, for rare behaviour of real nodes."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from imstream.client import Client, Reply, Timing
from imstream.frame_parser import parse_frame
from imstream.wire import ClientCancel, ClientChat, ClientFrame, ClientHeartbeat, ClientInit, ReceivedFrame
from tests.support.schemas import check_frame
from tests.support.users import USER_IDS
from tests.support.waiting import SLOW

LIMIT = 5.0 * SLOW
"""Maximum wait of a test in seconds."""

USER = 10001

FAST = Timing(
    open=timedelta(seconds=LIMIT),
    login=timedelta(seconds=LIMIT),
    probe=timedelta(minutes=1),
    backoff=timedelta(milliseconds=10),
    backoff_max=timedelta(milliseconds=50),
    later=timedelta(milliseconds=20),
    close=timedelta(seconds=1),
)
"""Short time limits of a client."""


async def within(awaitable: Awaitable[Any]) -> Any:  # noqa: ANN401 - any result
    """Wait with a time limit."""
    return await asyncio.wait_for(awaitable, LIMIT)


async def all_of(iterator: AsyncIterator[Any]) -> list[Any]:
    """Collect the items of an iterator."""
    return [item async for item in iterator]


class Peer:
    """The server's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket

    @property
    def path(self) -> str:
        """Path and query of the client's request."""
        assert self.socket.request is not None
        return self.socket.request.path

    @property
    def language(self) -> str | None:
        """The client's `Accept-Language`, if it sent one."""
        assert self.socket.request is not None
        return self.socket.request.headers.get("Accept-Language")

    async def hear(self) -> ClientFrame:
        """The next frame of the client except heartbeats."""
        while True:
            frame = await self.hear_anything()
            if not isinstance(frame, ClientHeartbeat):
                return frame

    async def hear_anything(self) -> ClientFrame:
        """The next frame of the client."""
        async with asyncio.timeout(LIMIT):
            text = await self.socket.recv()
        assert isinstance(text, str)
        check_frame(json.loads(text))
        return parse_frame(text, user_ids=USER_IDS)

    async def hear_init(self) -> ClientInit:
        """The next frame, which must be INIT."""
        frame = await self.hear()
        assert isinstance(frame, ClientInit)
        return frame

    async def hear_chat(self) -> ClientChat:
        """The next frame, which must be CHAT."""
        frame = await self.hear()
        assert isinstance(frame, ClientChat)
        return frame

    async def hear_cancel(self) -> ClientCancel:
        """The next frame, which must be CANCEL."""
        frame = await self.hear()
        assert isinstance(frame, ClientCancel)
        return frame

    async def send_frame(self, msg_type: str, **fields: Any) -> None:  # noqa: ANN401 - fields of `ReceivedFrame`
        """Send one frame; fields are named as in `ReceivedFrame`."""
        await self.socket.send(ReceivedFrame.model_validate({"msg_type": msg_type, **fields}).encode())

    async def send_chat(self, message_id: str | None, event: str, **fields: Any) -> None:  # noqa: ANN401 - same
        """Send one CHAT frame."""
        await self.send_frame("CHAT", message_id=message_id, event=event, **fields)

    async def close(self, code: int, reason: str = "") -> None:
        """Close the connection."""
        await self.socket.close(code, reason)

    def drop(self) -> None:
        """Break the connection without a close frame."""
        self.socket.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed the connection."""
        async with asyncio.timeout(LIMIT):
            await self.socket.wait_closed()


class ScriptedServer:
    """Accepts connections for the test.

    Attributes:
        refusals: Number of next handshakes that get 503, as from a node that is not ready.
    """

    def __init__(self) -> None:
        self.port = 0
        self.refusals = 0
        self._peers: asyncio.Queue[Peer] = asyncio.Queue()

    @property
    def url(self) -> str:
        """URL for a client."""
        return f"ws://127.0.0.1:{self.port}/ws"

    async def peer(self) -> Peer:
        """The next connection."""
        async with asyncio.timeout(LIMIT):
            return await self._peers.get()

    async def logged_in(self, **fields: Any) -> Peer:  # noqa: ANN401 - fields of `ReceivedFrame`
        """The next connection, with its INIT answered."""
        peer = await self.peer()
        await peer.hear_init()
        await peer.send_frame("INIT", **fields)
        return peer

    def refuse(self, socket: ServerConnection, _: Request) -> Response | None:
        """Refuse a handshake while `refusals` remain."""
        if self.refusals == 0:
            return None
        self.refusals -= 1
        return socket.respond(503, "not ready: draining")

    async def handle(self, socket: ServerConnection) -> None:
        """Keep a connection open until either side closes it."""
        self._peers.put_nowait(Peer(socket))
        await socket.wait_closed()


@asynccontextmanager
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    """Run a server on a free port of 127.0.0.1. At its end, no new task may remain."""
    before = asyncio.all_tasks()
    server = ScriptedServer()
    async with serve(
        server.handle, "127.0.0.1", 0, close_timeout=1, max_size=2**22, max_queue=4, process_request=server.refuse
    ) as listener:
        server.port = listener.sockets[0].getsockname()[1]
        yield server
    left = asyncio.all_tasks() - before
    assert not left, f"tasks are left: {left}"


@dataclass
class Session:
    """A logged-in client, and the server's end of its latest connection."""

    server: ScriptedServer
    client: Client
    peer: Peer

    async def asked(self, contents: str = "hello", **options: Any) -> Reply:  # noqa: ANN401 - options of `send`
        """Send a message that the server accepts, and return its reply."""
        reply = await self.client.send(contents, **options)
        while (await self.peer.hear_chat()).message_id != reply.message_id:
            pass  # an earlier message, which stays unanswered
        await self.peer.send_chat(reply.message_id, "accepted", position=1)
        await within(reply.accepted())
        return reply

    async def lose_connection(self) -> None:
        """Break the connection and log the client in again."""
        self.peer.drop()
        self.peer = await self.server.logged_in()


@asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[Session]:  # noqa: ANN401 - options of `Client`
    """Run a client of a scripted server."""
    async with scripted_server() as server:
        login = asyncio.create_task(server.logged_in())
        async with Client(server.url, USER, **{"timing": FAST, **options}) as client:
            yield Session(server, client, await login)
