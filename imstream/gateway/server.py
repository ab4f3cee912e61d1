"""The HTTP server of a node: uvicorn with limits, on a socket that listens before anything else starts.

uvicorn 0.54 keeps a connection for ever that sends nothing, half a request, or does not read its response; it does not
limit headers, pipelined requests and connections, logs a warning for each invalid request, and frees the parser of an
upgraded connection only by garbage collection. The limits use its undocumented names (test_private_names.py).
"""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from imstream.ai.router import capacity
from imstream.errors import SettingsError
from imstream.gateway.registry import CLOSE_GRACE
from imstream.gateway.websocket_protocol import ServeSocket, SocketOptions, SocketProtocol
from imstream.settings import Settings
from imstream.settings_group import ENV_PREFIX
from imstream.token_bucket import TokenBucket

MAX_HEAD = 16_384
"""Maximum bytes of a request up to the end of its headers. More is answered with 431."""

MAX_HEADERS = 128
"""Maximum headers of a request, trailers included: each takes more memory than its bytes. More is answered with 431."""

MAX_ITEMS = 8
"""Maximum items of a handshake header that is a list, such as the subprotocols. More is answered with 400."""

REFUSAL_TIME = 2.0
"""Seconds a client has to read an error response. Data that it sends meanwhile is discarded; if it stayed unread, the
kernel would send a reset, which might overtake the response."""

MAX_DISCARDED = 1 << 20  # maximum bytes that are discarded so; then the connection is aborted

SPARE_CONNECTIONS = 512
"""Connections besides the sockets of the settings: handshakes, the page, health checks, sockets that are closing."""

METRICS_CONNECTIONS = 16  # maximum connections to the listener of metrics

OTHER_FILES = 64
"""Files that a node has open besides connections to clients and the AI backend: Redis, logs, the event loop."""

log = structlog.get_logger()
_request_log = logging.getLogger("uvicorn.error.request")


def _error_response(status: str, sentence: str, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", "Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(sentence)}")
    return "\r\n".join((*lines, *headers, "Connection: close", "", sentence)).encode()


_HEADERS_TOO_LARGE = _error_response("431 Request Header Fields Too Large", "The request headers are too large")
_TOO_MANY_ITEMS = _error_response("400 Bad Request", f"A header has more than {MAX_ITEMS} items")
_OTHER_VERSION = _error_response(  # RFC 6455, section 4.4
    "426 Upgrade Required", "Only version 13 of WebSocket is spoken", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
)
_TOO_MANY_CONNECTIONS = _error_response("503 Service Unavailable", "Too many connections")


class _RequestRejected(Exception):  # noqa: N818 - the client's fault, not an error of ours
    """Stops the parser from within its callback."""


class HandshakeProtocol(HttpToolsProtocol):
    """A connection until it becomes a WebSocket, if it does. Each request and its response have a time limit."""

    _head_size: int | None = None
    _too_large = False
    _upgrading = False
    _discarded: int | None = None
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, max_connections: int, time_limit: float, **options: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(**options)
        self.logger = _request_log
        self._max_connections = max_connections
        self._time_limit = time_limit

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit, or refuse a connection too many."""
        super().connection_made(transport)
        self._start_timer(self._time_limit)
        if len(self.connections) > self._max_connections:
            transport.write(_TOO_MANY_CONNECTIONS)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._stop_timer()
        self._unset_keepalive_if_required()  # after a reset uvicorn keeps this timer, which refers to this object
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the time limit of the next request; a connection that closes has the rest of the last one."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._start_timer(self._time_limit)

    def on_message_begin(self) -> None:
        """Start a request, unless the one before is not answered yet: no browser or load balancer pipelines."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            raise _RequestRejected  # it is answered with 400
        super().on_message_begin()
        self._head_size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Accept a header or trailer, up to their maximum number."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._too_large = True
            if self.cycle is not None:
                self.cycle.disconnected = True  # it was a trailer
            raise _RequestRejected

    def on_headers_complete(self) -> None:
        """Stop counting the bytes of the head."""
        self._head_size = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse bytes. Until the end of a head, they are limited to its maximum size."""
        while data and not self.transport.is_closing():
            if self._discarded is not None:
                self._discarded += len(data)
                if self._discarded > MAX_DISCARDED:
                    self.transport.abort()
                return
            limit = MAX_HEAD - (self._head_size or 0)
            piece, data = data[:limit], data[limit:]
            super().data_received(piece)
            if self._upgrading:
                self._upgrade()  # data after the handshake, before its response, is discarded
                return
            if self._head_size is not None:
                self._head_size += len(piece)
                if self._head_size >= MAX_HEAD:
                    self._refuse(_HEADERS_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Refuse an invalid request."""
        if self._too_large:
            self._refuse(_HEADERS_TOO_LARGE)
        else:
            super().send_400_response(msg)

    def handle_websocket_upgrade(self) -> None:
        """Upgrade later: uvicorn calls this in an exception handler, which would keep the exception and its frames."""
        self._upgrading = True

    def _upgrade(self) -> None:
        if (refusal := _handshake_refusal(self.headers)) is not None:
            self._refuse(refusal)
            return
        self._stop_timer()
        super().handle_websocket_upgrade()
        del self.parser, self.cycle, self.headers, self.scope, self.url  # the first two refer to this object

    def _refuse(self, response: bytes) -> None:
        """Send a response and close; the client has some time to read it."""
        if not self.transport.is_closing():
            self._head_size, self._discarded = None, 0
            self.transport.write(response)
            self.transport.write_eof()
            self._start_timer(REFUSAL_TIME)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _handshake_refusal(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The response to a handshake that websockets should not parse; None if it may. It checks everything else."""
    if any(name == b"sec-websocket-version" and value.strip() != b"13" for name, value in headers):
        return _OTHER_VERSION
    for of in (b"connection", b"upgrade", b"sec-websocket-protocol"):
        if sum(value.count(b",") + 1 for name, value in headers if name == of) > MAX_ITEMS:
            return _TOO_MANY_ITEMS
    return None


class HttpServer(uvicorn.Server):
    """`listen`, then `serve` until `stop`. `setting`: the setting of its address, for errors."""

    _listener: socket.socket

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        setting: str,
        limits: tuple[int, float],
        **options: Any,  # noqa: ANN401 - uvicorn's
    ) -> None:
        """`limits`: maximum connections, and the seconds for a request."""
        config = uvicorn.Config(
            app,
            http=partial(HandshakeProtocol, *limits),  # type: ignore[arg-type] # it is only called
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(CLOSE_GRACE) + 1,
            **options,
        )
        super().__init__(config)
        self.port = port  # the port that it listens on
        self._host, self._setting = host, setting

    @property
    def address(self) -> str:
        """Where it listens, as `http://host:port`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def listen(self) -> None:
        """Bind the address.

        Raises:
            SettingsError: It cannot be bound.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # Without dualstack_ipv6, `::` would not include the addresses of IPv4.
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server((self._host, self.port), family=family, backlog=2048, dualstack_ipv6=both)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else "the host is unknown"
            raise SettingsError(f"{self._setting}: cannot listen: {reason}") from None
        # Accepted sockets inherit it. uvloop sets it by itself, asyncio only on sockets that it made.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port, self._listener = listener.getsockname()[1], listener

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `stop`."""
        await super().serve(sockets or [self._listener])

    def stop(self) -> None:
        """Stop. uvicorn closes every socket at once: drain them before."""
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the node: uvicorn would close every socket before it is drained."""
        yield


class GatewayServer(HttpServer):
    """The server of clients."""

    def __init__(self, app: ASGIApp, settings: Settings, serve_socket: ServeSocket) -> None:
        frame_rate = TokenBucket(settings.frame_rate, settings.frame_burst) if settings.frame_rate else None
        options = SocketOptions(settings.max_frame, frame_rate, serve_socket)
        limits = (_max_connections(settings), settings.handshake_timeout.total_seconds())
        _request_log.setLevel(logging.ERROR)  # a client's mistake is no warning for the operator

        def make_socket(server_state: ServerState, **_: object) -> SocketProtocol:
            return SocketProtocol(options, server_state.connections, server_state.tasks)  # type: ignore[arg-type]

        host, port = settings.host, settings.port
        setting = f"{ENV_PREFIX}HOST={host} {ENV_PREFIX}PORT={port}"
        super().__init__(app, host, port, setting=setting, limits=limits, ws=make_socket)


def metrics_server(app: ASGIApp, settings: Settings, *, node_port: int) -> HttpServer | None:
    """The listener of metrics, if they have one. `node_port`: where the node listens."""
    if (address := settings.metrics_address(node_port)) is None:
        return None
    setting = f"{ENV_PREFIX}METRICS={settings.metrics}"
    limits = (METRICS_CONNECTIONS, settings.handshake_timeout.total_seconds())
    return HttpServer(app, *address, setting=setting, limits=limits, ws="none")


def files_needed(settings: Settings) -> int:
    """Maximum number of files that a node has open. Raises `SettingsError`."""
    return settings.node_sockets + SPARE_CONNECTIONS + capacity(settings) + OTHER_FILES


def _max_connections(settings: Settings) -> int:
    """How many connections a flood may open, so that files are left for Redis and the backend.

    The soft limit of open files is raised as far as necessary and allowed.
    """
    needed, others = files_needed(settings), capacity(settings) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed - others
    files = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    if files < needed:
        log.warning("fewer sockets than set: raise the limit of open files", files=files, needed=needed)
    return max(1, files - others)
