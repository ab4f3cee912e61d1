"""The connection of a client: made, used, lost and made again, until the client is closed or told not to come back.

Two coroutines share one connection: one speaks (logs in, sends what is unanswered, then heartbeats), one listens and
decides what a close means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from pydantic import ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from imstream.client.cancel import Cancel
from imstream.client.credentials import Credentials, NoToken
from imstream.client.errors import ClientClosed, SessionEnded
from imstream.client.message import Message
from imstream.client.pending import PendingRequests
from imstream.client.reconnect import Backoff, Patience, Reaction, Servers, Timing, address, after_close
from imstream.wire import (
    ClientCancel,
    ClientFrame,
    ClientHeartbeat,
    ClientInit,
    CloseCode,
    Code,
    MsgType,
    ServerFrame,
    UserId,
)

MAX_FRAME = 16 * 2**20
"""Largest frame taken from a server, in bytes: a resumed answer comes as one. More ends the connection."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connected:
    """The client is logged in.

    Attributes:
        url: The server's address.
        node: Id of the node, when it said so.
        resumed: Accepted messages that go on.
    """

    url: str
    node: str | None
    resumed: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """There is no connection; another try follows.

    Attributes:
        why: What happened, for a person.
        retry_in: When the next try begins.
    """

    why: str
    retry_in: timedelta


ConnectionChange = Connected | Disconnected


class ReconnectingConnection:
    """Keeps one logged-in connection to one of the servers.

    Attributes:
        settled: Set when it was logged in once, or never will be.
        last_word: The server's last sentence that is not about a message, or what went wrong.
    """

    def __init__(
        self,
        servers: Servers,
        identity: Credentials,
        timing: Timing,
        ledger: PendingRequests,
        on_change: Callable[[ConnectionChange], None] | None,
    ) -> None:
        self.settled = asyncio.Event()
        self.last_word = ""
        self._servers = servers
        self._identity = identity
        self._timing = timing
        self._ledger = ledger
        self._on_change = on_change
        self._pace = Backoff(timing)
        self._socket: ClientConnection | None = None  # only while logged in
        self._logged_in = asyncio.Event()  # of the present connection
        self._ending = asyncio.Event()  # of the login, on the present connection
        self._heartbeat = timing.heartbeat  # as the present server asks for it

    async def run(self) -> None:
        """Keep a connection until the session ends for good. At the end nothing waits any more."""
        try:
            while True:
                reaction = await self._connection()
                if reaction.patience is Patience.NEVER:
                    return
                untried = reaction.elsewhere and self._servers.move()
                wait = self._pace.wait(Patience.NOW if untried else reaction.patience)
                self._tell(Disconnected(self.last_word, wait))
                await asyncio.sleep(wait.total_seconds())
        finally:
            self._ledger.end(ClientClosed("the client was closed"))
            self.settled.set()

    async def send_message(self, message: Message) -> None:
        """Ask the AI, once per connection; without a connection it is done after the next login."""
        await self._send_once(message, message.chat)

    async def send_cancel(self, cancel: Cancel) -> None:
        """Ask to cancel, once per connection; without a connection it is done after the next login."""
        await self._send_once(cancel, cancel_frame(self._identity.user_id, cancel.message_id))

    async def _send_once(self, item: Message | Cancel, frame: ClientFrame) -> None:
        socket = self._socket
        if socket is None or item.sent_on is socket or item.ended:
            return
        item.sent_on = socket
        try:
            await socket.send(_encode(frame))
        except ConnectionClosed:
            return  # the listener sees it too; `sent_on` is not the next connection

    async def _connection(self) -> Reaction:
        """One connection from its beginning to its end, and what to do then."""
        try:
            async with asyncio.timeout(self._timing.login.total_seconds()):
                token = await self._identity.show()
        except (NoToken, TimeoutError) as error:
            self.last_word = str(error) or "no token in time"
            return Reaction(Patience.BACKOFF)
        if self._identity.is_refused:
            self._ledger.end(SessionEnded(CloseCode.NOT_AUTHENTICATED, self.last_word))
            return Reaction(Patience.NEVER)
        try:
            socket = await connect(
                address(self._servers.current, self._identity.user_id),
                additional_headers={"Accept-Language": self._identity.lang},
                compression=None,
                open_timeout=self._timing.login.total_seconds(),
                close_timeout=self._timing.close.total_seconds(),
                max_size=MAX_FRAME,
                ssl=self._servers.current_tls,
            )
        except (OSError, WebSocketException) as error:
            self.last_word = f"{self._servers.current}: {error}"
            return Reaction(Patience.BACKOFF, elsewhere=True)
        self._logged_in.clear()
        self._ending.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                speaker = tasks.create_task(self._speak(socket, token))
                reaction = await self._listen(socket)
                speaker.cancel()
        finally:
            self._socket = None
            await socket.close()
        return reaction

    async def _speak(self, socket: ClientConnection, token: str | None) -> None:
        try:
            await socket.send(_encode(self._init(token)))
            async with asyncio.timeout(self._timing.login.total_seconds()):
                await self._logged_in.wait()
            for message in self._ledger.unanswered:
                await self.send_message(message)
            for cancel in self._ledger.cancels:
                await self.send_cancel(cancel)
            beat = _encode(ClientHeartbeat(msg_type="HEARTBEAT", user_id=self._identity.user_id))
            while True:
                await socket.send(_encode(again) if (again := await self._log_in_again()) is not None else beat)
        except TimeoutError:
            self.last_word = "the server did not answer the login in time"
            await socket.close()
        except ConnectionClosed:
            return  # the listener sees it too, and decides

    async def _log_in_again(self) -> ClientInit | None:
        """What to say when the login is about to end; None when it is time for a heartbeat instead."""
        try:
            async with asyncio.timeout(self._heartbeat.total_seconds()):
                await self._ending.wait()
        except TimeoutError:
            return None
        self._ending.clear()
        try:
            async with asyncio.timeout(self._timing.login.total_seconds()):
                token = await self._identity.show()
        except (NoToken, TimeoutError) as error:
            logger.warning("the login ends: %s", str(error) or "no token in time")
            return None
        return ClientInit(msg_type="INIT", user_id=self._identity.user_id, token=token)

    def _init(self, token: str | None) -> ClientInit:
        resumed = self._ledger.accepted
        for message in resumed:
            message.resuming = True
        resume = [message.resume_point for message in resumed]
        return ClientInit(msg_type="INIT", user_id=self._identity.user_id, token=token, resume=resume)

    async def _listen(self, socket: ClientConnection) -> Reaction:
        try:
            while True:
                frame = _decode(await socket.recv())
                if frame is not None and not self._take(frame, socket):
                    return Reaction(Patience.BACKOFF, elsewhere=True)
        except ConnectionClosed as closed:
            return self._closed(closed, socket)

    def _take(self, frame: ServerFrame, socket: ClientConnection) -> bool:
        """Take in one frame; False when the server could not log us in, or could not resume."""
        if frame.msg_type is MsgType.CHAT:
            self._pace.succeed()
            self._ledger.chat(frame)
        elif frame.msg_type is MsgType.INIT:
            self._welcome(frame, socket)
        elif frame.msg_type is MsgType.SYSTEM and not self._ledger.system(frame):
            self.last_word = frame.contents or frame.code
            if frame.code is Code.UNAUTHORIZED and self._logged_in.is_set() and self._identity.is_fresh:
                self._ending.set()
            return frame.code is not Code.UNAVAILABLE
        return True

    def _welcome(self, frame: ServerFrame, socket: ClientConnection) -> None:
        self._identity.believed()
        if self._logged_in.is_set():
            return  # it goes on longer
        self._socket = socket
        self._servers.succeed()
        announced = frame.heartbeat_ms
        self._heartbeat = timedelta(milliseconds=announced) if announced else self._timing.heartbeat
        self._logged_in.set()
        self.settled.set()
        self._tell(Connected(self._servers.current, frame.node, len(self._ledger.accepted)))

    def _closed(self, closed: ConnectionClosed, socket: ClientConnection) -> Reaction:
        code = None if closed.rcvd is None else closed.rcvd.code
        reaction = after_close(code)
        if code == CloseCode.NOT_AUTHENTICATED and self._identity.refused(was_in=self._logged_in.is_set()):
            return Reaction(Patience.BACKOFF)
        if reaction.patience is Patience.NEVER:
            self._ledger.end(SessionEnded(code or 0, self.last_word or "the server ended the session"))
        elif code == CloseCode.FRAME_TOO_BIG:
            self._ledger.drop_largest(socket)
        self.last_word = str(closed)
        return reaction

    def _tell(self, change: ConnectionChange) -> None:
        logger.info("%s", change)
        if self._on_change is not None:
            self._on_change(change)


def cancel_frame(user_id: UserId, message_id: str) -> ClientCancel:
    """The frame that asks to cancel a message.

    Raises:
        ValueError: The id is malformed.
    """
    return ClientCancel(msg_type="CANCEL", user_id=user_id, message_id=message_id)


def _encode(frame: ClientFrame) -> str:
    return frame.model_dump_json(by_alias=True, exclude_none=True)


def _decode(text: str | bytes) -> ServerFrame | None:
    """Read a frame; None for one that this client does not know, such as one of a newer server."""
    try:
        return ServerFrame.model_validate_json(text)
    except ValidationError as error:
        logger.warning("a frame that is not understood was left out: %s", error.errors(include_input=False)[0])
        return None
