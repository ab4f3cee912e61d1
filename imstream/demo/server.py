"""Runs the demo backend: within an event loop that is there, or as a process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvloop

from imstream.demo.backend import DemoBackend, DemoCall
from imstream.demo.http_server import HttpServer
from imstream.demo.settings import DemoSettings

_STOP_AFTER = 1
"""Seconds that running answers get at the end: their callers are gone by then, or don't mind."""


@asynccontextmanager
async def serving(settings: DemoSettings) -> AsyncIterator[str]:
    """Serve the demo backend in this event loop, for as long as the context lasts.

    Yields:
        The base URL that clients take, ending in `/v1`.

    Raises:
        OSError: The address cannot be listened on.
    """
    server = HttpServer(DemoCall, DemoBackend(settings).answer)
    async with server.listening(settings.host, settings.port, grace=_STOP_AFTER) as (host, port):
        yield f"http://{host}:{port}/v1"


def run(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    """Serve the demo backend until SIGTERM or SIGINT.

    Args:
        settings: How it behaves.
        announce: Called with the base URL when it serves.

    Raises:
        OSError: The address cannot be listened on.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, announce))


async def _serve(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as url:
        announce(url)
        await stop.wait()
