"""The HTTP server around the demo backend.

uvicorn with a bare ASGI application: measured beside aiohttp.web with the same answers, it takes three quarters of the
CPU (84 against 114 µs for an answer of 32 deltas at once, 22 against 29 µs for a delta sent alone), and what it takes
is missing for the node that is being looked at.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from imstream.ai.demo.backend import DemoBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from imstream.ai.demo.settings import DemoSettings

_BACKLOG = 2048
_KEEP_ALIVE = 75
"""Seconds an idle connection is kept: longer than clients do, so that it is they who close."""
_STOP_AFTER = 1
"""Seconds that running answers get at the end: their callers are gone by then, or don't mind."""


class _Server(uvicorn.Server):
    """A server whose signals are handled by whoever runs it; uvicorn's own handling ends the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(settings: DemoSettings) -> AsyncIterator[str]:
    """Serve the demo backend in this event loop, for as long as the context lasts.

    Yields:
        The base URL that clients take, ending in `/v1`.

    Raises:
        OSError: The address cannot be listened on.
    """
    listener = socket.create_server((settings.host, settings.port), backlog=_BACKLOG)
    # Accepted connections inherit it. asyncio sets it only on sockets whose protocol number says TCP, which this one's
    # does not: each answer would wait 40 ms for an acknowledgement (uvloop sets it always).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        DemoBackend(settings),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_STOP_AFTER,
    )
    server = _Server(config)
    host, port = listener.getsockname()[:2]
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        server.should_exit = True
        await task


def run(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    """Serve the demo backend until SIGTERM or SIGINT.

    Args:
        settings: How it behaves.
        announce: Called with the base URL when it serves.

    Raises:
        OSError: The address cannot be listened on.
    """
    # uvicorn calls every answer that is cut an error of the application; here they are cut on purpose.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, announce))


async def _serve(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as url:
        announce(url)
        await stop.wait()
