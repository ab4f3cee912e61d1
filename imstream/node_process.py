"""A process that runs one node: its signals, its event loop and its traces."""

import asyncio
import gc
import os
import signal

import structlog
import uvloop

from imstream import logs
from imstream.ai.router import Backends
from imstream.node import Node
from imstream.settings import Settings
from imstream.tracing import Tracing, wants_tracing

log = structlog.get_logger()


def _start_tracing(settings: Settings) -> Tracing:
    if not wants_tracing(os.environ):
        return Tracing()
    try:
        from imstream.otel import OtelTracing  # noqa: PLC0415 - optional
    except ImportError as error:
        log.error("traces are not recorded: install imstream-server[otel]", error=str(error))  # noqa: TRY400 - no defect
        return Tracing()
    return OtelTracing(settings.node)


async def serve(settings: Settings) -> None:
    """Serve one node until SIGTERM or SIGINT, then drain it; reload on SIGHUP."""
    tracing = _start_tracing(settings)
    async with Backends(settings) as backends:
        node = Node(settings, backends, tracing)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, node.shut_down)
        loop.add_signal_handler(signal.SIGHUP, node.reload)
        await node.serve()
    await tracing.stop()


def run(settings: Settings) -> None:
    """Run one node in this process, on uvloop. Return when it has drained."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a node that can reload
    logs.configure(settings)
    # Collect rarely, and never among the modules: the defaults took 7 % of a busy node's CPU and found hardly any.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    uvloop.run(serve(settings))
