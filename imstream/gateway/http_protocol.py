"""A connection until it becomes a WebSocket, if it does: uvicorn's protocol, with limits.

Found in uvicorn 0.54: a connection that says nothing, or half of a request, or does not take its answer, is kept for
ever; the headers of a request gather without limit, and so do requests that do not wait for the answer to the one
before, whose answers then fail when the connection ends; each broken request is a warning in the log; connections
are taken until there are no files left; and after an upgrade the parser and the protocol hold each other, with all that
was read, until the garbage collector runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from imstream.settings import Settings
from imstream.token_bucket import TokenBucket

MAX_HEAD = 16_384
"""Most bytes of a request up to the end of its headers. More is answered with 431."""

MAX_HEADERS = 128
"""Most headers of a request, trailers included: each takes more memory than its bytes. More is answered with 431."""

MAX_ITEMS = 8
"""Most items in a header of a handshake that is a list, such as its subprotocols. More is answered with 400."""

REFUSAL_TIME = 2.0
"""Seconds that a client has to read a refusal. What it sends meanwhile is discarded, or the reset that unread bytes
cause might overtake the answer."""

MAX_DISCARDED = 1 << 20
"""Most bytes that are discarded so; then the connection is cut."""

SPARE_CONNECTIONS = 512
"""Connections that a node takes beside its sockets: handshakes, the page, health checks, sockets that are closing."""


def _refusal(status: str, sentence: str, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", "Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(sentence)}")
    return "\r\n".join((*lines, *headers, "Connection: close", "", sentence)).encode()


HEADERS_TOO_LARGE = _refusal("431 Request Header Fields Too Large", "The request headers are too large")
_TOO_MANY_ITEMS = _refusal("400 Bad Request", f"A header has more than {MAX_ITEMS} items")
_OTHER_VERSION = _refusal(  # RFC 6455, section 4.4
    "426 Upgrade Required", "Only version 13 of WebSocket is spoken", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
)
_TOO_MANY_CONNECTIONS = _refusal("503 Service Unavailable", "Too many connections")


class GatewayConfig(uvicorn.Config):
    """uvicorn's configuration, and what our protocols need of the node's."""

    def __init__(self, settings: Settings, **options: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(**options)
        self.handshake_timeout = settings.handshake_timeout.total_seconds()
        self.request_log = logging.getLogger("uvicorn.error.request")
        self.request_log.setLevel(logging.ERROR)  # what strangers do wrong is no warning to us
        self.most_connections = settings.node_sockets + SPARE_CONNECTIONS
        self.frame_pace = TokenBucket(settings.frame_rate, settings.frame_burst) if settings.frame_rate else None


class _RequestRejected(Exception):  # noqa: N818 - their fault, not an error of ours
    """Raised in a callback of the parser: the request goes no further."""


class HandshakeProtocol(HttpToolsProtocol):
    """From the connection, and again from each answer, there is a time for the next request and its answer."""

    _in_head = False
    _head_size = 0
    _too_large = False
    _upgrading = False
    _discarded: int | None = None
    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, config: GatewayConfig, **given: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(config, **given)
        self.logger = config.request_log
        self._patience = config.handshake_timeout
        self._limit = config.most_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connects."""
        super().connection_made(transport)
        self._start_clock(self._patience)
        if len(self.connections) > self._limit:
            transport.write(_TOO_MANY_CONNECTIONS)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """They are gone."""
        self._stop_clock()
        self._unset_keepalive_if_required()  # uvicorn leaves this timer, and the timer this object, after a reset
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """A request is answered."""
        super().on_response_complete()
        if not self.transport.is_closing():  # who is to be gone has the rest of the time to take the answer
            self._start_clock(self._patience)

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.cycle is not None and not self.cycle.response_complete:
            # No browser and no load balancer does this any more. The parser is stopped, and the answer is 400.
            self.cycle.disconnected = True
            raise _RequestRejected
        super().on_message_begin()
        self._in_head, self._head_size = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, but not any number of them."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._too_large = True
            if self.cycle is not None:
                self.cycle.disconnected = True  # it was a trailer
            raise _RequestRejected

    def on_headers_complete(self) -> None:
        """Its headers have ended."""
        self._in_head, self._head_size = False, 0
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take bytes, but no more than a head may have before its end is seen."""
        while data and not self.transport.is_closing():
            if self._discarded is not None:
                self._discard(len(data))
                return
            piece, data = data[: MAX_HEAD - self._head_size], data[MAX_HEAD - self._head_size :]
            super().data_received(piece)
            if self._upgrading:
                self._upgrade()  # what came behind the handshake, before it was answered, is lost
                return
            if self._in_head:
                self._head_size += len(piece)
                if self._head_size >= MAX_HEAD:
                    self._refuse(HEADERS_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read."""
        if self._too_large:
            self._refuse(HEADERS_TOO_LARGE)
        else:
            super().send_400_response(msg)

    def handle_websocket_upgrade(self) -> None:
        """It is to become a socket. uvicorn says so while it handles an exception, which would be kept with it."""
        self._upgrading = True

    def _upgrade(self) -> None:
        """It becomes a socket, which has its own times; or it is refused."""
        if (refusal := _refusal_of(self.headers)) is not None:
            self._refuse(refusal)
            return
        self._stop_clock()
        super().handle_websocket_upgrade()
        del self.parser, self.cycle, self.headers, self.scope, self.url  # the first two hold this object

    def _refuse(self, answer: bytes) -> None:
        """Answer, hang up, and let the client read it."""
        if self.transport.is_closing():
            return
        self._in_head, self._discarded = False, 0
        self.transport.write(answer)
        self.transport.write_eof()
        self._start_clock(REFUSAL_TIME)

    def _discard(self, size: int) -> None:
        self._discarded = (self._discarded or 0) + size
        if self._discarded > MAX_DISCARDED:
            self.transport.abort()

    def _start_clock(self, seconds: float) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _refusal_of(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """Why there will be no handshake, as an answer. All else that may be wrong with one, websockets finds."""
    if any(name == b"sec-websocket-version" and value != b"13" for name, value in headers):
        return _OTHER_VERSION
    for of in (b"connection", b"upgrade", b"sec-websocket-protocol"):
        if sum(value.count(b",") + 1 for name, value in headers if name == of) > MAX_ITEMS:
            return _TOO_MANY_ITEMS
    return None
