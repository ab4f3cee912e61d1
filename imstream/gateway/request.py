"""A connection until it becomes a WebSocket, if it does: uvicorn's protocol, with limits.

Found in uvicorn 0.54: a connection that says nothing, or half of a request, or does not take its answer, is kept for
ever; the headers of a request gather without limit, and so do requests that do not wait for the answer to the one
before, whose answers then fail when the connection ends; each broken request is a warning in the log; and connections
are taken until there are no files left.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from imstream.bucket import Pace

if TYPE_CHECKING:
    import asyncio

    from imstream.settings import Settings

MAX_HEAD = 65_536
"""Most bytes of a request up to the end of its headers. More is answered with 431."""

SPARE_CONNECTIONS = 512
"""Connections that a node takes beside its sockets: handshakes, the page, health checks, sockets that are closing."""


def _refusal(status: str, sentence: str) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(sentence)}\r\nConnection: close\r\n\r\n{sentence}"
    ).encode()


HEADERS_TOO_LARGE = _refusal("431 Request Header Fields Too Large", "The request headers are too large")
_TOO_MANY_CONNECTIONS = _refusal("503 Service Unavailable", "Too many connections")


class GatewayConfig(uvicorn.Config):
    """uvicorn's configuration, and what our protocols need of the node's."""

    def __init__(self, settings: Settings, **options: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(**options)
        self.handshake_timeout = settings.handshake_timeout.total_seconds()
        self.request_log = logging.getLogger("uvicorn.error.request")
        self.request_log.setLevel(logging.ERROR)  # what strangers do wrong is no warning to us
        self.most_connections = settings.node_sockets + SPARE_CONNECTIONS
        self.frame_pace = Pace(settings.frame_rate, settings.frame_burst) if settings.frame_rate else None


class _TooEarly(Exception):  # noqa: N818 - their fault, not an error of ours
    """A request came before the one before it was answered."""


class RequestProtocol(HttpToolsProtocol):
    """From the connection, and again from each answer, there is a time for the next request and its answer."""

    _in_head = False
    _head_size = 0
    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, config: GatewayConfig, **given: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(config, **given)
        self.logger = config.request_log
        self._patience = config.handshake_timeout
        self._limit = config.most_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connects."""
        super().connection_made(transport)
        self._start_clock()
        if len(self.connections) > self._limit:
            transport.write(_TOO_MANY_CONNECTIONS)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """They are gone."""
        self._stop_clock()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """A request is answered."""
        super().on_response_complete()
        if not self.transport.is_closing():  # who is to be gone has the rest of the time to take the answer
            self._start_clock()

    def handle_websocket_upgrade(self) -> None:
        """It becomes a socket, which has its own times."""
        self._stop_clock()
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.cycle is not None and not self.cycle.response_complete:
            # No browser and no load balancer does this any more. The parser is stopped, and the answer is 400.
            self.cycle.disconnected = True
            raise _TooEarly
        super().on_message_begin()
        self._in_head, self._head_size = True, 0

    def on_headers_complete(self) -> None:
        """Its headers have ended."""
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take bytes, but not headers without end."""
        super().data_received(data)
        if self._in_head:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD and not self.transport.is_closing():
                self.transport.write(HEADERS_TOO_LARGE)
                self.transport.close()

    def _start_clock(self) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(self._patience, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
