"""The HTTP server of a node: uvicorn with our protocols, on a socket that is listening before anything else begins."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from imstream.errors import SettingsError
from imstream.gateway.protocol import SocketProtocol
from imstream.gateway.registry import CLOSE_GRACE
from imstream.gateway.request import GatewayConfig, RequestProtocol
from imstream.settings import ENV_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp

    from imstream.settings import Settings


class Server:
    """Serves an application. `listen`, then `run` until `stop`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._settings = settings
        self._port = settings.port
        self._listener: socket.socket | None = None
        self._server = _Uvicorn(
            GatewayConfig(
                settings,
                app=app,
                host=settings.host,
                port=settings.port,
                http=RequestProtocol,
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
        )

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
        try:
            listener = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise SettingsError(
                f"{ENV_PREFIX}HOST={host} {ENV_PREFIX}PORT={port}: cannot listen: {os.strerror(error.errno or 0)}"
            ) from None
        # Accepted sockets inherit it. uvloop sets it by itself, asyncio only on sockets that it made.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
