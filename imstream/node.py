"""The composition root: builds all parts of one node, starts them, and drains them in order."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import structlog
import uvicorn

from imstream import logs
from imstream.ai.backend import OpenAIBackend
from imstream.ai.breaker import Breaker
from imstream.errors import SettingsError
from imstream.gateway.app import make_app
from imstream.gateway.protocol import RequestProtocol, SocketProtocol
from imstream.gateway.registry import CLOSE_GRACE, Registry
from imstream.gateway.session import Services
from imstream.reply import ReplyBoard
from imstream.settings import ENV_PREFIX
from imstream.store import health
from imstream.store.connection import Commands, Reader
from imstream.store.replies import ReplyStore
from imstream.store.requests import RequestStream
from imstream.texts import Text
from imstream.wire import Close
from imstream.worker.job import Parts
from imstream.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from imstream.ai.backend import Backend
    from imstream.settings import Settings

log = structlog.get_logger()

_TICK = 0.05
"""Seconds between two looks while something is awaited that has no event of its own."""


class Node:
    """One node. `serve` runs it until `shut_down` is called; then it drains and returns."""

    def __init__(self, settings: Settings, backend: Backend, commands: Commands, reader: Reader) -> None:
        self.settings = settings
        self._commands = commands
        board = ReplyBoard()
        requests = RequestStream(commands, reader, settings)
        replies = ReplyStore(commands, settings)
        self.board = board
        self.worker = Worker(Parts(settings, requests, replies, board, backend, Breaker(settings)))
        self.registry = Registry(settings)
        services = Services(settings, requests, replies, board, self.worker, self.registry)
        self._server = _Server(
            uvicorn.Config(
                make_app(services, not_ready=self.not_ready),
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
        self._ending = asyncio.Event()
        self._port = settings.port

    def not_ready(self) -> str | None:
        """Why the node cannot serve right now; None when it can."""
        if self._ending.is_set():
            return "draining"
        settings = self.settings
        patience = settings.read_block + settings.redis_timeout + settings.redis_timeout
        return None if self.worker.progressed_within(patience.total_seconds()) else "redis does not answer"

    @property
    def address(self) -> str:
        """Where the node listens, as `http://host:port`."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self._port}"

    def shut_down(self) -> None:
        """Drain and end."""
        self._ending.set()

    async def serve(self) -> None:
        """Serve until `shut_down`."""
        listener = self._listen()
        async with asyncio.TaskGroup() as group:
            looking_after = group.create_task(self.registry.run(), name="registry")
            working = group.create_task(self.worker.run(), name="worker")
            serving = group.create_task(self._server.serve([listener]), name="server")
            announcing = group.create_task(self._announce(), name="announce")
            await self._ending.wait()
            announcing.cancel()
            await self._drain(working)
            # Only now: uvicorn closes every socket as soon as it is told to exit.
            self._server.should_exit = True
            await serving
            working.cancel()
            looking_after.cancel()

    def _listen(self) -> socket.socket:
        host, port = self.settings.host, self.settings.port
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
        return listener

    async def _announce(self) -> None:
        while not self._server.started or self.not_ready() is not None:  # noqa: ASYNC110 - two parts' states
            await asyncio.sleep(_TICK)
        log.info("ready", node=self.settings.node, address=self.address)
        for warning in await health.warnings(self._commands):
            log.warning(warning)

    async def _drain(self, working: asyncio.Task[None]) -> None:
        log.info("draining", running=self.worker.running, sessions=len(self.registry))
        self.worker.stop()
        await self._close_sessions(only_idle=True, until=working, limit=self.settings.drain_grace.total_seconds())
        self.worker.drain()
        await asyncio.wait([working], timeout=self.settings.redis_timeout.total_seconds())
        await self._close_sessions(only_idle=False, until=None, limit=CLOSE_GRACE)
        log.info("drained", unfinished=self.worker.running, sessions=len(self.registry))

    async def _close_sessions(self, *, only_idle: bool, until: asyncio.Task[None] | None, limit: float) -> None:
        """Close sessions as 1012, those that wait for an answer made here last, until a task has ended or `limit`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        while loop.time() < deadline and (len(self.registry) > 0 if until is None else not until.done()):
            for session in self.registry:
                if not only_idle or session.is_idle():
                    session.close(Close.DRAINING, Text.DRAINING)
            await asyncio.sleep(_TICK)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close every socket before anything is drained."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def open_node(settings: Settings, backend: Backend | None = None) -> AsyncIterator[Node]:
    """Build a node with its connections; on leaving, close them. `backend` replaces the one of the settings."""
    reader = Reader(settings.redis_url, block=settings.read_block, timeout=settings.redis_timeout)
    try:
        async with Commands(
            settings.redis_url, lanes=settings.redis_connections, timeout=settings.redis_timeout
        ) as commands:
            if backend is not None:
                yield Node(settings, backend, commands, reader)
            else:
                async with OpenAIBackend(settings) as own:
                    yield Node(settings, own, commands, reader)
    finally:
        await reader.aclose()


async def serve(settings: Settings, backend: Backend | None = None) -> None:
    """Serve one node until SIGTERM or SIGINT, then drain it."""
    async with open_node(settings, backend) as node:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, node.shut_down)
        await node.serve()


def run(settings: Settings) -> None:
    """Run one node in this process, on uvloop. Returns after it was told to end and has drained."""
    import uvloop  # noqa: PLC0415 - not there on every system that can import this module

    logs.configure(settings)
    _tune_garbage_collector()
    uvloop.run(serve(settings))


def _tune_garbage_collector() -> None:
    """Look for cycles rarely, and never among the modules: it took 7 % of a busy node's CPU to find next to none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
