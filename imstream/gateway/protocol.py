"""uvicorn's WebSocket protocol, mended where a hostile or stalled peer could hurt others.

Found in uvicorn 0.54: an upgrade request that its parser refuses gets no answer and makes the shutdown fail; a stalled
reader blocks `send`, and with it every orderly close; fragments without end gather without limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from imstream.gateway.bell import Bell

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from starlette.types import Scope
    from uvicorn._types import ASGIReceiveEvent
    from uvicorn.config import Config
    from uvicorn.server import ServerState
    from websockets.frames import Frame
    from websockets.http11 import Request

MAX_FRAGMENTS = 1_000
"""Most fragments of one message; empty ones do not count towards its size. More closes 1009."""

EXPEL_GRACE = 2.0
"""Seconds an expelled peer has to read its last frames before the connection is cut."""

_EXTENSION = "imstream.socket"

_HEADERS_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 33\r\nConnection: close\r\n\r\n"
    b"The request headers are too large"
)


class Socket(Protocol):
    """A socket under its session: more direct than ASGI, and able to end a peer that does not read."""

    async def push(self, texts: Sequence[str]) -> None:
        """Write text frames in one go, once the peer has taken enough of what was written before.

        Raises:
            ClientDisconnected: The peer is gone, or was expelled.
        """

    def forget_handshake(self) -> None:
        """Free what only the handshake needed."""

    def expel(self, code: int, last_words: str) -> None:
        """Put `last_words` and the close frame behind what is unsent, and cut the connection a little later."""


def socket_of(scope: Scope) -> Socket:
    """The protocol under an ASGI WebSocket scope."""
    socket: Socket = scope["extensions"][_EXTENSION]
    return socket


class _Inbox:
    """What uvicorn uses of asyncio.Queue, for its one reader, in a tenth of the memory."""

    __slots__ = ("_bell", "_events")

    def __init__(self) -> None:
        self._events: list[ASGIReceiveEvent] = []
        self._bell = Bell()

    def empty(self) -> bool:
        return not self._events

    def put_nowait(self, event: ASGIReceiveEvent) -> None:
        self._events.append(event)
        self._bell.ring()

    async def get(self) -> ASGIReceiveEvent:
        while not self._events:
            await self._bell.wait()
        return self._events.pop(0)


class SocketProtocol(WebSocketsSansIOProtocol):
    """One WebSocket connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.queue = _Inbox()  # type: ignore[assignment]

    def handle_connect(self, event: Request) -> None:
        """Let the application reach this object through its scope."""
        super().handle_connect(event)
        if self.response.status_code == 101:  # noqa: PLR2004 - Switching Protocols
            self.scope["extensions"][_EXTENSION] = self  # type: ignore[index, assignment]

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment, up to the limit."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(1009, "too many fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_parser_exception(self) -> None:
        """Answer an upgrade request that cannot be read; close a connection whose frames are broken."""
        if not self.handshake_initiated:
            self.close_sent = True
            self.transport.write(_HEADERS_TOO_LARGE)
            self.transport.close()
            return
        super().handle_parser_exception()

    def shutdown(self) -> None:
        """Close at shutdown, also a connection that never came to its handshake."""
        if not self.handshake_initiated:
            self.transport.close()
            return
        super().shutdown()

    async def push(self, texts: Sequence[str]) -> None:
        """See `Socket`. One system call for all frames: each costs as much as making several."""
        await self.writable.wait()
        if self.disconnected or self.close_sent:
            raise ClientDisconnected
        try:
            for text in texts:
                self.conn.send_text(text.encode())
        except InvalidState:  # the peer is closing by itself
            raise ClientDisconnected from None
        self.transport.write(b"".join(self.conn.data_to_send()))

    def forget_handshake(self) -> None:
        """See `Socket`. The parsed headers, and a copy of them: 4 KB that an idle socket would keep."""
        del self.request, self.response

    def expel(self, code: int, last_words: str) -> None:
        """See `Socket`. It waits for nobody: the peer may not be reading at all."""
        if self.close_sent or self.disconnected:
            self.transport.abort()
            return
        try:
            self.conn.send_text(last_words.encode())
            self.conn.send_close(code)
        except InvalidState:  # the peer is closing by itself
            self.transport.abort()
            return
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})
        self.loop.call_later(EXPEL_GRACE, self.transport.abort)
