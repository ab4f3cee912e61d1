"""The connection of a client: opened, used, lost and opened again, until the client is closed or the session ends.

Two coroutines share one connection: `_send_frames` logs in, sends pending requests, then heartbeats; `_receive` applies
frames and interprets closes.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from pydantic import ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.proxy import get_proxy
from websockets.uri import parse_uri

from imstream.client.errors import ClientClosed, SessionEnded
from imstream.client.pending import CancelRequest, PendingRequests
from imstream.client.reconnect import (
    Backoff,
    Credentials,
    ReconnectPolicy,
    RetryMode,
    Servers,
    Timing,
    TokenUnavailable,
    after_close,
    connect_url,
)
from imstream.client.reply import Reply
from imstream.codes import CloseCode, Code, Event, MsgType
from imstream.urls import is_loopback, redact_url
from imstream.wire import ClientFrame, ClientHeartbeat, ClientInit, ReceivedFrame

MAX_FRAME = 16 * 2**20
"""Maximum size of a server's frame in bytes; a resumed answer is one frame. A larger one ends the connection."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connected:
    """The client is logged in. `node`: its id, if the server sent it; `resumed`: resumed messages."""

    url: str
    node: str | None
    resumed: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is lost, or could not be opened. `why`: the cause; `retry_in`: the delay of the next try."""

    why: str
    retry_in: timedelta


ConnectionChange = Connected | Disconnected


@dataclass(kw_only=True, eq=False, repr=False)
class ReconnectingConnection:
    """Keeps one logged-in connection to one of the servers."""

    servers: Servers
    credentials: Credentials
    timing: Timing
    pending: PendingRequests
    on_change: Callable[[ConnectionChange], None] | None
    on_asked: Callable[[ReceivedFrame], Awaitable[None]]

    def __post_init__(self) -> None:
        self.settled = asyncio.Event()  # set by the first login, or by an error that rules it out
        self.last_error = ""  # the server's last sentence that concerns no message, or the cause of the last failure
        self._backoff = Backoff(self.timing)
        self._heartbeat = self.timing.heartbeat
        # State of the current connection.
        self._socket: ClientConnection | None = None  # only while logged in
        self._logged_in = asyncio.Event()
        self._login_expires = asyncio.Event()
        self._last_frame: ReceivedFrame | None = None

    async def run(self) -> None:
        """Keep a connection until the session ends. On return no request is pending."""
        try:
            while True:
                policy = await self._connect_once()
                if policy.mode is RetryMode.NEVER:
                    return
                has_untried = policy.switch_server and self.servers.advance()
                delay = self._backoff.delay(RetryMode.NOW if has_untried else policy.mode)
                self._notify(Disconnected(self.last_error, delay))
                await asyncio.sleep(delay.total_seconds())
        finally:
            self.pending.fail_all(ClientClosed("the client was closed"))
            self.settled.set()

    async def send(self, request: Reply | CancelRequest) -> None:
        """Send a request, once per connection. Without a connection it is sent after the next login."""
        socket = self._socket
        if socket is None or request.sent_on is socket or request.ended:
            return
        is_new, request.sent_on = request.sent_on is None, socket
        is_busy = any(reply.sent_on is socket and reply is not request for reply in self.pending.unanswered)
        try:
            if is_new and not is_busy:  # the server handles frames in their order
                self._expect(asyncio.ensure_future(await socket.ping()), socket)
            await socket.send(_encode(request.frame))
        except ConnectionClosed:
            return  # `_receive` handles the close; the next connection sends the request again

    def _expect(self, pong: asyncio.Future[float], socket: ClientConnection) -> None:
        """Abort a connection without a pong or another frame in time: a dead one cannot be detected otherwise."""
        heard = self._last_frame

        def check() -> None:
            if not pong.done() and self._last_frame is heard:
                socket.transport.abort()
            elif not pong.done():
                self._expect(pong, socket)

        asyncio.get_running_loop().call_later(self.timing.probe.total_seconds(), check)

    async def _connect_once(self) -> ReconnectPolicy:
        """Run one connection from its handshake to its end."""
        try:
            token = await self._next_token()
        except TokenUnavailable as error:
            self.last_error = str(error)
            return ReconnectPolicy(RetryMode.BACKOFF)
        if self.credentials.is_rejected:
            self.pending.fail_all(SessionEnded(CloseCode.NOT_AUTHENTICATED, self.last_error))
            return ReconnectPolicy(RetryMode.NEVER)
        url = self.servers.current
        proxy = None if is_loopback(urlsplit(url).hostname or "") else get_proxy(parse_uri(url))
        try:
            socket = await connect(
                connect_url(url, self.credentials.user_id),
                additional_headers={"Accept-Language": self.credentials.lang} if self.credentials.lang else None,
                compression=None,
                open_timeout=self.timing.login.total_seconds(),
                close_timeout=self.timing.close.total_seconds(),
                max_size=MAX_FRAME,
                proxy=proxy,
                ssl=(self.servers.tls or True) if url.lower().startswith("wss:") else None,
            )
        except (OSError, WebSocketException, ValueError, ImportError) as error:  # of a wrong port, of SOCKS
            way = f"{url} through the proxy {redact_url(proxy)}" if proxy else url
            why = os.strerror(error.errno) if isinstance(error, ConnectionRefusedError) and error.errno else str(error)
            self.last_error = f"{way}: {redact_url(why)}"
            return ReconnectPolicy(RetryMode.BACKOFF, switch_server=True)
        self._logged_in.clear()
        self._login_expires.clear()
        self._last_frame = None
        try:
            async with asyncio.TaskGroup() as tasks:
                sender = tasks.create_task(self._send_frames(socket, token))
                policy = await self._receive(socket)
                sender.cancel()
        finally:
            self._socket = None
            await socket.close()
        return policy

    async def _next_token(self) -> str | None:
        """The next token; raises `TokenUnavailable` also after `timing.login`."""
        try:
            async with asyncio.timeout(self.timing.login.total_seconds()):
                return await self.credentials.next_token()
        except TimeoutError:
            raise TokenUnavailable("no token in time") from None

    async def _send_frames(self, socket: ClientConnection, token: str | None) -> None:
        user_id, resumed = self.credentials.user_id, self.pending.accepted
        for reply in resumed:
            reply.resuming = True
        resume = [reply.resume_point for reply in resumed]
        heartbeat = ClientHeartbeat(msg_type="HEARTBEAT", user_id=user_id)
        try:
            await socket.send(_encode(self.credentials.init(token, resume)))
            async with asyncio.timeout(self.timing.login.total_seconds()):
                await self._logged_in.wait()
            requests: list[Reply | CancelRequest] = [*self.pending.unanswered, *self.pending.cancels]
            for request in requests:
                await self.send(request)
            while True:
                await socket.send(_encode(await self._renewal() or heartbeat))
        except TimeoutError:
            self.last_error = "the server did not answer the login in time"
            await socket.close()
        except ConnectionClosed:
            return  # `_receive` handles the close

    async def _renewal(self) -> ClientInit | None:
        """Wait for one heartbeat interval. If the login expires meanwhile, return the INIT that renews it."""
        try:
            async with asyncio.timeout(self._heartbeat.total_seconds()):
                await self._login_expires.wait()
        except TimeoutError:
            return None
        self._login_expires.clear()
        try:
            token = await self._next_token()
        except TokenUnavailable as error:
            logger.warning("cannot renew the login: %s", error)
            return None
        return self.credentials.init(token)

    async def _receive(self, socket: ClientConnection) -> ReconnectPolicy:
        try:
            while True:
                frame = self._last_frame = _decode(await socket.recv())
                if frame is not None and frame.event is Event.ASKED:
                    await self.on_asked(frame)
                if frame is not None and not self._apply(frame, socket):
                    return ReconnectPolicy(RetryMode.BACKOFF, switch_server=True)
        except ConnectionClosed as closed:
            return self._on_close(closed, socket)

    def _apply(self, frame: ReceivedFrame, socket: ClientConnection) -> bool:
        """Apply one frame; False if the server could not log the client in, or could not resume."""
        if frame.msg_type is MsgType.CHAT:
            self._backoff.reset()
            self.pending.apply_chat(frame)
        elif frame.msg_type is MsgType.INIT:
            self.credentials.on_accepted()
            if not self._logged_in.is_set():  # else the login was renewed
                self._on_login(frame, socket)
        elif frame.msg_type is MsgType.SYSTEM and not self.pending.apply_system(frame):
            self.last_error = frame.contents or frame.code
            if frame.code is Code.UNAUTHORIZED and self._logged_in.is_set() and self.credentials.is_renewable:
                self._login_expires.set()
            return frame.code is not Code.UNAVAILABLE
        return True

    def _on_login(self, frame: ReceivedFrame, socket: ClientConnection) -> None:
        self._socket = socket
        self.servers.reset()
        announced = frame.heartbeat_ms
        self._heartbeat = timedelta(milliseconds=announced) if announced else self.timing.heartbeat
        self._logged_in.set()
        self.settled.set()
        self._notify(Connected(self.servers.current, frame.node, len(self.pending.accepted)))

    def _on_close(self, closed: ConnectionClosed, socket: ClientConnection) -> ReconnectPolicy:
        code, reason = (None, "") if closed.rcvd is None else (closed.rcvd.code, closed.rcvd.reason)
        cause = self._cause_of(code)
        problem = "the connection broke" if closed.rcvd is closed.sent is None else str(closed)
        self.last_error = (cause and cause.contents) or reason or problem
        policy = after_close(code, cause.code if cause else None)
        if policy.mode is RetryMode.NEVER and code == CloseCode.NOT_AUTHENTICATED:
            policy = self.credentials.on_rejected(was_logged_in=self._logged_in.is_set())
        if policy.mode is RetryMode.NEVER:
            self.pending.fail_all(SessionEnded(code or 0, self.last_error))
        elif code == CloseCode.FRAME_TOO_BIG:
            self.pending.fail_largest(socket)
        return policy

    def _cause_of(self, code: int | None) -> ReceivedFrame | None:
        """The frame with the reason why the server has closed the connection with this code, if there is one."""
        frame = self._last_frame
        is_told = code is not None and code >= CloseCode.INTERNAL_ERROR
        return frame if is_told and frame is not None and frame.msg_type is MsgType.SYSTEM else None

    def _notify(self, change: ConnectionChange) -> None:
        logger.info("%s", change)
        if self.on_change is not None:
            self.on_change(change)


def _encode(frame: ClientFrame) -> str:
    return frame.model_dump_json(by_alias=True, exclude_none=True)


def _decode(text: str | bytes) -> ReceivedFrame | None:
    """Parse a frame; None if its form is unknown here, such as a frame of a newer server."""
    try:
        return ReceivedFrame.model_validate_json(text)
    except ValidationError as error:
        logger.warning("frame ignored: %s", error.errors(include_input=False)[0])
        return None
