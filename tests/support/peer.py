"""A client without code of imstream: the `websockets` package, JSON, and the documented protocol.

    async with peer(node.ws(10001), user=10001) as someone:   # connected, logged in
        await someone.chat("hello", "m1")                      # its first answer: accepted, or the refusal
        told = await someone.end_of("m1")                      # told.text, told.terminal

It checks received frames: each fits one schema of asyncapi.json, and nothing follows the end of a message.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from imstream.user_ids import UserId
from tests.support.schemas import check_frame
from tests.support.users import query
from tests.support.waiting import SLOW

LIMIT = 20.0 * SLOW
"""Maximum wait for one frame in seconds."""

TERMINAL = frozenset({"done", "failed", "cancelled"})

CODES_BEFORE_CLOSE = {
    1011: {"SYSTEM_ERROR"},
    1012: {"DRAINING"},
    1013: {"NODE_FULL", "UNAVAILABLE"},
    4001: {"NO_HEARTBEAT"},
    4002: {"READER_TOO_SLOW"},
    4500: {"INIT_TIMEOUT", "UNAUTHORIZED"},
    4501: {"SYSTEM_ERROR"},
    4502: {"REPLACED"},
    4503: {"FORBIDDEN"},
    4504: {"TOO_MANY_SOCKETS"},
}
"""Codes of the SYSTEM frame before each close code. No other close code has one."""

Frame = dict[str, Any]


@dataclass
class Told:
    """The frames of one message, assembled as every client must.

    Attributes:
        text: The deltas since `accepted` or the last `restart`.
        events: The events in order, including those of earlier sockets.
        terminal: The terminal frame.
    """

    text: str = ""
    attempt: int = 0
    offset: int = 0
    events: list[str] = field(default_factory=list)
    terminal: Frame | None = None

    def take(self, frame: Frame) -> None:
        """Take the next frame about this message."""
        event = frame["event"]
        if self.terminal is not None and self.terminal["event"] == "failed" and event == "restart":
            assert frame["attempt"] > self.attempt
            self.terminal = None  # an operator has retried it
        assert self.terminal is None, f"{event} came after the end"
        self.events.append(event)
        if event == "accepted":  # the text starts again
            self.text, self.attempt, self.offset = "", 0, 0
        if event in {"delta", "restart"}:
            self.text = "" if event == "restart" else self.text + frame["contents"]
            self.attempt, self.offset = frame["attempt"], frame["offset"]
        if event in TERMINAL:
            self.terminal = frame

    @property
    def point(self) -> Frame:
        """The position for `resume` in the next INIT, without the message id."""
        return {"attempt": self.attempt, "offset": self.offset}


class Peer:
    """One socket.

    Attributes:
        frames: All frames so far.
        told: The assembled frames of each message.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.frames: list[Frame] = []
        self.told: dict[str, Told] = {}

    async def send(self, data: str | bytes) -> None:
        """Send a message as it is."""
        await self.connection.send(data)

    async def send_frame(self, msg_type: str, **fields: Any) -> None:  # noqa: ANN401 - any field, right or wrong
        """Send a frame."""
        await self.send(json.dumps({"msgType": msg_type, **fields}))

    async def frame(self, limit: float = LIMIT) -> Frame:
        """The next frame."""
        async with asyncio.timeout(limit):
            text = await self.connection.recv()
        assert isinstance(text, str), "only text frames are promised"
        frame: Frame = json.loads(text)
        check_frame(frame)
        self.frames.append(frame)
        if frame.get("event"):
            self.told.setdefault(frame["messageId"], Told()).take(frame)
        return frame

    async def until(self, limit: float = LIMIT, **fields: Any) -> Frame:  # noqa: ANN401 - any field
        """Skip to the next frame with these fields."""
        async with asyncio.timeout(limit):
            while True:
                frame = await self.frame(limit)
                if all(frame.get(name) == value for name, value in fields.items()):
                    return frame

    async def login(self, user: UserId, resume: Mapping[str, Told] | None = None, token: str | None = None) -> Frame:
        """Send INIT, repeatedly while Redis is unavailable, and resume messages that another socket received so far."""
        for message_id, told in (resume or {}).items():
            self.told[message_id] = replace(told, events=list(told.events))
        points = [{"messageId": message_id, **told.point} for message_id, told in (resume or {}).items()]
        while True:
            await self.send_frame("INIT", userId=user, resume=points, **({} if token is None else {"token": token}))
            while (frame := await self.frame())["msgType"] != "INIT":
                if frame["code"] == "UNAVAILABLE" and "messageId" not in frame:
                    await asyncio.sleep(0.1)
                    break  # retry
            else:
                return frame

    async def chat(self, user: UserId, contents: str, message_id: str, **fields: Any) -> Frame:  # noqa: ANN401 - any field
        """Send a CHAT and return the first frame about it: `accepted`, or the refusal."""
        told = self.told.get(message_id)
        if told is not None and told.terminal is not None:
            del self.told[message_id]  # sent again: the whole answer is sent again
        await self.send_frame("CHAT", userId=user, contents=contents, messageId=message_id, **fields)
        while True:
            frame = await self.until(messageId=message_id)
            if frame["msgType"] == "SYSTEM" or frame["event"] == "accepted":
                return frame

    async def some_text(self, message_id: str, length: int = 1) -> Told:
        """Wait for that many characters of an answer that must not end before."""
        while len(self._of(message_id).text) < length:
            await self.until(messageId=message_id)
        assert self._of(message_id).terminal is None, "it ended too early for this test"
        return self._of(message_id)

    async def end_of(self, message_id: str) -> Told:
        """Wait for the end of a message."""
        while self._of(message_id).terminal is None:
            await self.until(messageId=message_id)
        return self._of(message_id)

    async def closed(self, limit: float = LIMIT) -> int:
        """Wait until the server closes the socket, and return the close code; 1006 without a close frame.

        A close has a reason, and a frame before it with the reason if its code promises one.
        """
        async with asyncio.timeout(limit):
            while True:
                try:
                    await self.frame(limit)
                except ConnectionClosed as closed:
                    if closed.rcvd is None:
                        return 1006
                    check_close(closed.rcvd.code, closed.rcvd.reason, self.frames)
                    return closed.rcvd.code

    def _of(self, message_id: str) -> Told:
        return self.told.setdefault(message_id, Told())


def check_close(code: int, reason: str, frames: Sequence[Frame]) -> None:
    """Check the reason of a close, and the code of the frame before it."""
    assert reason, f"a close with {code} and no reason"
    if (codes := CODES_BEFORE_CLOSE.get(code)) is not None:
        assert frames[-1]["msgType"] == "SYSTEM", f"no SYSTEM frame before a close with {code}"
        assert frames[-1]["code"] in codes, f"{frames[-1]['code']} before a close with {code}"


@asynccontextmanager
async def peer(  # noqa: PLR0913 - one is required, the others are options
    url: str,
    *,
    user: UserId | None = None,
    lang: str | None = None,
    resume: Mapping[str, Told] | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    subprotocols: Sequence[str] | None = None,
) -> AsyncIterator[Peer]:
    """Connect, once the node is ready: on a busy machine it may lose a short lease, or Redis. With a user, log in, too.

    Args:
        url: The node's WebSocket URL.
        user: The user that logs in; None leaves INIT to the test.
        lang: The handshake's `Accept-Language`.
        resume: The frames of unfinished messages on other sockets.
        token: The token in INIT.
        headers: Additional headers of the handshake.
        subprotocols: The offered subprotocols.
    """
    all_headers = {**({} if lang is None else {"Accept-Language": lang}), **(headers or {})}
    connection = await _connect(url, all_headers, subprotocols)
    try:
        someone = Peer(connection)
        if user is not None:
            await someone.login(user, resume, token)
        yield someone
    finally:
        await _close(connection)


async def _connect(url: str, headers: Mapping[str, str], subprotocols: Sequence[str] | None) -> ClientConnection:
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                return await connect(
                    url,
                    additional_headers=headers,
                    subprotocols=None if subprotocols is None else [Subprotocol(name) for name in subprotocols],
                    compression=None,
                    max_size=None,
                    ping_interval=None,
                    proxy=None,
                )
            except InvalidStatus as refused:
                if refused.response.status_code != 503 or b"draining" in (refused.response.body or b""):
                    raise
            await asyncio.sleep(0.1)  # retry


async def _close(connection: ClientConnection) -> None:
    """Close it and discard its unread frames: `websockets` stops reading at 16, and then waits 10 s for the close."""
    closing = asyncio.create_task(connection.close())
    with suppress(ConnectionClosed):
        while True:
            await connection.recv()
    await closing


async def answered(urls: str | Sequence[str], user: UserId, questions: Mapping[str, str]) -> dict[str, Told]:
    """Ask questions (by message id) until all are answered, as a good client does.

    When the socket breaks, it reconnects to the next URL, resumes accepted messages and sends the others again.
    """
    addresses = cycle([urls] if isinstance(urls, str) else urls)
    told = {message_id: Told() for message_id in questions}
    while any(one.terminal is None for one in told.values()):
        accepted = {message_id: one for message_id, one in told.items() if one.events and one.terminal is None}
        try:
            async with peer(f"{next(addresses)}?{query(user)}") as someone:
                try:
                    await someone.login(user, accepted)
                    for message_id in questions:
                        if not told[message_id].events:
                            await someone.send_frame(
                                "CHAT", userId=user, contents=questions[message_id], messageId=message_id
                            )
                    for message_id in questions:
                        if told[message_id].terminal is None:
                            await someone.end_of(message_id)
                finally:
                    told.update(someone.told)
        except (ConnectionClosed, InvalidHandshake, OSError):
            await asyncio.sleep(0.05)  # retry
    return told


async def all_answered(
    urls: str | Mapping[int, Sequence[str]], asked: Mapping[int, Mapping[str, str]]
) -> dict[tuple[int, str], Told]:
    """Run `answered` for several users concurrently, with shared URLs or URLs per user; results by user and message."""
    everybody: Sequence[dict[str, Told]] = await asyncio.gather(
        *(answered(urls if isinstance(urls, str) else urls[user], user, asked[user]) for user in asked)
    )
    return {
        (user, message_id): one for user, told in zip(asked, everybody, strict=True) for message_id, one in told.items()
    }
