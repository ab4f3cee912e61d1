"""The HTTP server of a node: uvicorn with our protocols, on a socket that is listening before anything else begins."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import uvicorn
from starlette.types import ASGIApp

from imstream.errors import SettingsError
from imstream.gateway.http_protocol import SPARE_CONNECTIONS, GatewayConfig, HandshakeProtocol
from imstream.gateway.registry import CLOSE_GRACE
from imstream.gateway.websocket_protocol import SocketProtocol
from imstream.settings import ENV_PREFIX, Settings

OTHER_FILES = 64
"""Files that a node has open beside its connections to clients and to the AI backend: Redis, logs, the event loop."""

log = structlog.get_logger()


def most_connections(settings: Settings) -> int:
    """How many connections a node takes: all that its settings allow, unless this process may not open so many files.

    Without this a flood would leave none for Redis and the backend.
    """
    wanted = settings.node_sockets + SPARE_CONNECTIONS
    others = settings.concurrency + OTHER_FILES
    files = _raise_file_limit(wanted + others)
    if files < wanted + others:
        log.warning("fewer sockets than set: raise the limit of open files", files=files, needed=wanted + others)
    return max(1, min(wanted, files - others))


def _raise_file_limit(wanted: int) -> int:
    """Have this process allowed to open so many files, as far as it may allow itself; how many it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files


class GatewayServer:
    """Serves an application. `listen`, then `run` until `stop`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._settings = settings
        self._port = settings.port
        self._listener: socket.socket | None = None
        self._config = GatewayConfig(
            settings,
            app=app,
            host=settings.host,
            port=settings.port,
            http=HandshakeProtocol,
            ws=SocketProtocol,
            ws_max_size=settings.max_frame,
            ws_per_message_deflate=False,
            # The heartbeat of the protocol tells more than a ping, and costs no timer for each socket.
            ws_ping_interval=None,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(CLOSE_GRACE) + 1,
        )
        self._server = _Uvicorn(self._config)

    @property
    def started(self) -> bool:
        """Whether it takes connections."""
        return self._server.started

    @property
    def address(self) -> str:
        """Where it listens, as `http://host:port`."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"http://{host}:{self._port}"

    def listen(self) -> None:
        """Take the address.

        Raises:
            SettingsError: It cannot be had.
        """
        host, port = self._settings.host, self._settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # `::` is every address, those of IPv4 too. By itself Python asks for those of IPv6 alone.
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
        except OSError as error:
            raise SettingsError(
                f"{ENV_PREFIX}HOST={host} {ENV_PREFIX}PORT={port}: cannot listen: {os.strerror(error.errno or 0)}"
            ) from None
        # Accepted sockets inherit it. uvloop sets it by itself, asyncio only on sockets that it made.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._config.most_connections = most_connections(self._settings)
        self._port = listener.getsockname()[1]
        self._listener = listener

    async def run(self) -> None:
        """Serve on that address."""
        await self._server.serve(None if self._listener is None else [self._listener])

    def stop(self) -> None:
        """End. uvicorn closes every socket at once: whatever is to be drained must be by now."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: it would close every socket before anything is drained."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
