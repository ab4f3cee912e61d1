"""A scenario of the conformance kit: its server, its connections, and the client under test; see conform.py."""

import asyncio
import json
from asyncio.subprocess import Process
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from imstream import wire
from imstream.codes import Code
from imstream.frame_parser import InvalidFrame, parse_frame
from imstream.wire import ClientChat, ClientFrame, ClientHeartbeat, ClientInit, Delta, ServerFrame

USER = 10001
PIECES = ("Blue ", "🌊, ", "蓝")  # offsets count code points, not bytes or UTF-16 units
WHOLE = {"outcome": "done", "text": "".join(PIECES)}

T = TypeVar("T")
F = TypeVar("F", bound=ClientFrame)


class Nonconformity(Exception):  # noqa: N818 - what the kit looks for
    """The client violates the protocol."""


def same(what: str, found: object, expected: object) -> None:
    """Raise `Nonconformity` unless something is as expected."""
    if found != expected:
        raise Nonconformity(f"{what}: {found}, expected {expected}")


class Stage:
    """The server of one scenario, its latest connection, and the client under test.

    `limit`: seconds that the client has for each reaction.
    """

    def __init__(self, client: Process, limit: float) -> None:
        self.port = 0
        self.sockets: asyncio.Queue[ServerConnection] = asyncio.Queue()
        self.socket: ServerConnection
        self.path = ""
        self.transcript = list[str]()
        self._client = client
        self._limit = limit

    async def serve(self, socket: ServerConnection) -> None:
        """Keep a connection until either side closes it."""
        self.sockets.put_nowait(socket)
        await socket.wait_closed()

    async def within(self, waiting: Awaitable[T], what: str) -> T:
        """Wait for a reaction of the client."""
        try:
            return await asyncio.wait_for(waiting, self._limit)
        except TimeoutError:
            raise Nonconformity(f"no {what} within {self._limit:g} s") from None

    def do(self, step: str, **fields: object) -> None:
        """Tell the client to do something."""
        assert self._client.stdin is not None  # noqa: S101 - a pipe
        line = json.dumps({"step": step, **fields})
        self.transcript.append(f"step    {line}")
        self._client.stdin.write(line.encode() + b"\n")

    async def report(self, **expected: object) -> None:
        """Receive the client's next report, and check it."""
        told = await self.next_report(f"report {expected}")
        same("report", {name: told.get(name) for name in expected}, expected)

    async def next_report(self, what: str = "report") -> dict[str, object]:
        """Receive the client's next report."""
        assert self._client.stdout is not None  # noqa: S101 - a pipe
        line = await self.within(self._client.stdout.readline(), what)
        self.transcript.append(f"report  {line.decode(errors='replace').strip()}")
        told: object = None
        with suppress(ValueError):
            told = json.loads(line)
        if not isinstance(told, dict):
            raise Nonconformity("the report is no JSON object" if line else "the client has exited")
        return told

    async def receive(self) -> ClientFrame:
        """The next frame; heartbeats are answered."""
        text = str(await self.socket.recv())
        self.transcript.append(f"client  {text}")
        try:
            frame = parse_frame(text)
        except InvalidFrame as error:
            raise Nonconformity(f"an invalid frame: {error}") from None
        if isinstance(frame, ClientHeartbeat):
            await self.send(wire.HeartbeatReply(contents="ok"))
        return frame

    async def expect(self, kind: type[F]) -> F:
        """The next frame that is no heartbeat, which must be of a kind."""
        wanted = kind.__name__.removeprefix("Client").upper()
        while isinstance(frame := await self.within(self.receive(), wanted), ClientHeartbeat):
            pass
        if not isinstance(frame, kind):
            raise Nonconformity(f"msgType: {frame.msg_type}, expected {wanted}")
        return frame

    async def connect(self, *tokens: str) -> ClientInit:
        """Let the client start again, and receive its INIT."""
        self.do("connect", url=f"ws://127.0.0.1:{self.port}/ws", userId=USER, tokens=tokens or ("t-1",))
        return await self.connection()

    async def connection(self) -> ClientInit:
        """Receive INIT on the next connection."""
        self.socket = await self.within(self.sockets.get(), "connection")
        self.path = self.socket.request.path if self.socket.request else ""
        self.transcript.append(f"client  connects to {self.path}")
        return await self.expect(ClientInit)

    async def welcome(self, init: ClientInit, heartbeat_ms: int = 25_000) -> ClientInit:
        """Answer an INIT."""
        await self.send(wire.Welcome(contents="hello", user_id=init.user_id, heartbeat_ms=heartbeat_ms, node="0"))
        return init

    async def ask(self, message_id: str, *, is_accepted: bool = True) -> None:
        """Let the client send a message."""
        self.do("send", messageId=message_id, contents=f"question {message_id}")
        await self.expect_chat(message_id)
        if is_accepted:
            await self.send(accepted(message_id))

    async def expect_chat(self, message_id: str) -> None:
        """Receive a message, which may have been sent before."""
        chat = await self.expect(ClientChat)
        same("messageId and contents", (chat.message_id, chat.contents), (message_id, f"question {message_id}"))

    async def send(self, *frames: ServerFrame | dict[str, object]) -> None:
        """Send frames, also some that this version of the protocol does not have."""
        for frame in frames:
            text = json.dumps(frame) if isinstance(frame, dict) else frame.encode()
            self.transcript.append(f"server  {text}")
            await self.socket.send(text)

    async def close(self, code: int, why: Code) -> None:
        """Close the connection, after a frame with the reason. The client may be faster."""
        with suppress(ConnectionClosed):
            await self.send(wire.Problem(code=why, contents="because"))
            self.transcript.append(f"server  closes the connection with {code}")
            await self.socket.close(code)

    async def drop(self) -> None:
        """Break the connection once the client has received everything."""
        await self.within(await self.socket.ping(), "answer to a ping")
        self.transcript.append("server  breaks the connection")
        self.socket.transport.abort()


def accepted(message_id: str) -> ServerFrame:
    """The frame that accepts a message."""
    return wire.Accepted(contents="accepted", user_id=USER, message_id=message_id, position=1)


def answer(message_id: str, attempt: int = 1) -> list[ServerFrame]:
    """The frames of an answer: its deltas, and `done`."""
    common = {"message_id": message_id, "attempt": attempt}
    ends = [len("".join(PIECES[: count + 1])) for count in range(len(PIECES))]
    deltas = [Delta(contents=text, offset=end, **common) for text, end in zip(PIECES, ends, strict=True)]
    return [*deltas, wire.Done(offset=ends[-1], **common)]


def problem(code: Code, message_id: str, retry_after_ms: int | None = None) -> ServerFrame:
    """The frame that refuses a message, or a cancel."""
    return wire.Problem(code=code, contents="because", message_id=message_id, retry_after_ms=retry_after_ms)
