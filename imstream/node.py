"""The composition root: builds all parts of one node, starts them, and drains them in order."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from imstream import logs
from imstream.ai.backend import Backend, OpenAIBackend
from imstream.ai.breaker import Breaker
from imstream.ai.prompt.assembler import PromptAssembler
from imstream.ai.prompt.prompter import Prompter
from imstream.errors import NodeTaken, StoreError
from imstream.gateway.app import make_app
from imstream.gateway.connection import serve_socket
from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.frame_handler import SessionDeps
from imstream.gateway.presence import Presence
from imstream.gateway.registry import CLOSE_GRACE, Registry
from imstream.gateway.reply_sync import InboxConsumer, ReplySync
from imstream.gateway.server import GatewayServer
from imstream.gateway.session import Session
from imstream.guards.chain import GuardChain
from imstream.guards.guard import GuardDeps
from imstream.redis import health
from imstream.redis.client import BlockingReader, RedisClient
from imstream.redis.errors import AccessLog, retry_until_available
from imstream.reply_buffer import ReplyBuffers
from imstream.settings import Settings
from imstream.store.adoption import Adoption
from imstream.store.inbox import Inbox, NodeLeft
from imstream.store.leases import Leases
from imstream.store.replies import ReplyStore
from imstream.store.requests import RequestStream
from imstream.store.routes import Routes
from imstream.texts import Text
from imstream.wire import CloseCode, FrameLimits
from imstream.worker.adoption import Adopter
from imstream.worker.consumer import StreamConsumer
from imstream.worker.deps import WorkerDeps
from imstream.worker.jobs import Jobs
from imstream.worker.lease_keeper import LeaseKeeper

log = structlog.get_logger()

_STUCK = 4
"""Rounds of the consumer loop that may be missed before the node is taken for stuck."""

_RESTART = 1.0
"""Seconds before a background task that has failed is started again."""

_TICK = 0.05
"""Seconds between two looks while something is awaited that has no event of its own."""


@dataclass(frozen=True)
class Readers:
    """The connections of a node that wait: for requests, and for what other nodes have to tell."""

    requests: BlockingReader
    inbox: BlockingReader


class Node:
    """One node. `serve` runs it until `shut_down` is called; then it drains and returns."""

    def __init__(self, settings: Settings, backend: Backend, redis: RedisClient, readers: Readers) -> None:
        self.settings = settings
        self._redis = redis
        self._ending = asyncio.Event()
        self._reloading = asyncio.Event()
        self._requests = requests = RequestStream(redis, readers.requests, settings)
        replies = ReplyStore(redis, settings)
        self.buffers = buffers = ReplyBuffers()
        self.registry = registry = Registry(settings)
        self._inbox = inbox = Inbox(redis, readers.inbox, settings)
        self._leases = leases = Leases(redis, settings)
        self.lease_keeper = lease_keeper = LeaseKeeper(leases, settings)
        self.jobs = jobs = Jobs(settings, replies, buffers, inbox)
        self._reply_sync = ReplySync(
            interval=settings.sweep_interval, replies=replies, buffers=buffers, registry=registry
        )
        assembler = PromptAssembler(settings)
        self._guards = guards = GuardChain.create(
            GuardDeps(settings=settings, redis=redis, inbox=inbox, assembler=assembler)
        )
        prompter = Prompter(settings, backend, assembler)
        parts = WorkerDeps(
            settings,
            requests,
            replies,
            buffers,
            backend,
            prompter,
            Breaker(settings),
            guards,
            inbox,
            registry.follow_new,
        )
        self.consumer = StreamConsumer(parts, jobs, leases, lease_keeper)

        def make_consumer(node: str) -> StreamConsumer:
            """The same worker, pointed at another stream."""
            other = RequestStream(redis, readers.requests, settings, node=node)
            return StreamConsumer(replace(parts, requests=other), jobs, leases, lease_keeper)

        self.adopter = Adopter(settings, Adoption(redis, settings), leases, lease_keeper, make_consumer)
        self._presence = Presence(
            one_session=settings.sessions == "one",
            routes=Routes(redis, settings),
            inbox=inbox,
            registry=registry,
            guards=guards,
        )
        self._inbox_consumer = InboxConsumer(
            inbox=inbox, reply_sync=self._reply_sync, presence=self._presence, jobs=jobs, adopter=self.adopter
        )
        session_deps = SessionDeps(
            settings=settings,
            frame_limits=FrameLimits(settings.max_depth, settings.max_history),
            guards=guards,
            requests=requests,
            replies=replies,
            buffers=buffers,
            consumer=self.consumer,
            jobs=jobs,
            registry=registry,
            presence=self._presence,
            reply_sync=self._reply_sync,
            scheduler=FlushScheduler(),
            not_ready=self.not_ready,
        )
        app = make_app(session_deps, stuck=self.stuck)
        self._server = GatewayServer(app, settings, partial(serve_socket, deps=session_deps))

    def not_ready(self) -> str | None:
        """Why the node cannot serve right now; None when it can."""
        if self._ending.is_set():
            return "draining"
        if not self.consumer.reached_redis_within(self._patience):
            return "redis denies access, see the log" if self.consumer.denied else "redis does not answer"
        return None if self.lease_keeper.held else "the lease is not held"

    def stuck(self) -> str | None:
        """Why the node will not come back by itself; None when all is well or can become so."""
        return None if self.consumer.looped_within(_STUCK * self._patience) else "the consumer loop does not go on"

    @property
    def _patience(self) -> float:
        """Seconds that one round of the consumer loop may take: a read that blocks, and two that are slow."""
        settings = self.settings
        return (settings.read_block + 2 * settings.redis_timeout).total_seconds()

    def reload(self) -> None:
        """Read again what can change while the node runs."""
        self._reloading.set()

    def shut_down(self) -> None:
        """Drain and end."""
        self._ending.set()

    async def serve(self) -> None:
        """Serve until `shut_down`.

        Raises:
            SettingsError: It cannot listen where it should.
            NodeTaken: Another process runs this node.
        """
        self._server.listen()
        taken: BaseException | None = None
        try:
            async with self._guards.running(), asyncio.TaskGroup() as group:
                await self._serve(group)
        except* NodeTaken as refusal:
            taken = refusal
        # There is only one. Outside, because what is raised in `except*` becomes a group again (in Python 3.11.2).
        while isinstance(taken, BaseExceptionGroup):
            taken = taken.exceptions[0]
        if taken is not None:
            raise taken

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        for_ever = [
            group.create_task(task, name=name)
            for name, task in {
                "lease": kept_running("lease", partial(self.lease_keeper.run, self._server.address)),
                "stall": kept_running("stall", self.lease_keeper.stall.run),
                "registry": kept_running("registry", self.registry.run),
                "presence": kept_running("presence", self._presence.run),
                "reply-sync": kept_running("reply-sync", self._reply_sync.run),
                "inbox": kept_running("inbox", self._inbox_consumer.run),
                "flusher": kept_running("flusher", self.jobs.flush_periodically),
                "announce": self._announce(),
                "reload": self._reload_when_asked(),
            }.items()
        ]
        working = [
            group.create_task(self.consumer.run(), name="worker"),
            group.create_task(kept_running("adopter", self.adopter.run), name="adopter"),
        ]
        serving = group.create_task(self._server.run(), name="server")
        await self._ending.wait()
        for_ever.append(group.create_task(self._note_stop(), name="note-stop"))
        await asyncio.sleep(0)  # before anything else: a process runner may be about to stop Redis, too
        await self._drain(working)
        # Only now: uvicorn closes every socket as soon as it is told to exit.
        self._server.stop()
        await serving
        for task in (*for_ever, *working):
            task.cancel()

    async def _announce(self) -> None:
        while not self._server.started or self.not_ready() is not None:  # noqa: ASYNC110 - two parts' states
            await asyncio.sleep(_TICK)
        log.info("ready", node=self.settings.node, address=self._server.address)
        for warning in await health.warnings(self._redis):
            log.warning(warning)

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            reloaded = await self._guards.reload()
            log.info("reloaded" if reloaded else "nothing to reload", what=reloaded)

    async def _drain(self, working: list[asyncio.Task[None]]) -> None:
        """Take nothing new, let what runs end, hand back the rest, send the clients elsewhere, let others take over."""
        log.info("draining", running=len(self.jobs), sessions=len(self.registry))
        self.consumer.stop()
        self.adopter.stop()
        all_work = asyncio.gather(*working, return_exceptions=True)
        await self._close_sessions(only_idle=True, until=all_work, limit=self.settings.drain_grace.total_seconds())
        self.jobs.drain()
        await asyncio.wait([all_work], timeout=self.settings.redis_timeout.total_seconds())
        unfinished = await self._unfinished()
        await self._leave()
        await self._close_sessions(only_idle=False, until=None, limit=CLOSE_GRACE)
        log.info("drained", unfinished=unfinished, sessions=len(self.registry))

    async def _note_stop(self) -> None:
        """Note that this process was told to stop: however it ends, what it works on does not die with it."""
        noted, _ = await asyncio.gather(
            retry_until_available(self.lease_keeper.mark_stopping),
            self.jobs.uncount_deliveries(),
            return_exceptions=True,
        )
        if isinstance(noted, Exception):
            log.warning("the stop is not noted in the lease", error=str(noted))

    async def _unfinished(self) -> int:
        """How many requests are left to others: all in the stream of this node, and those begun of adopted ones."""
        left = self.jobs.unfinished()
        try:
            left[self.settings.node] = await self._requests.unfinished()
        except StoreError as error:
            log.warning("only requests in work are counted", error=str(error))
        return left.total()

    async def _leave(self) -> None:
        """Give the node up, and tell the others, so that what is left is adopted at once."""
        await self.lease_keeper.release()
        try:
            await self._inbox.notify(await self._leases.other_nodes(), NodeLeft(self.settings.node))
        except StoreError:
            return  # they see for themselves, a little later

    def _is_idle(self, session: Session) -> bool:
        """Whether no reply is made here that this session waits for."""
        return session.user_id is None or not any(
            self.jobs.is_working_on(session.user_id, message_id) for message_id in session.writer.followed
        )

    async def _close_sessions(self, *, only_idle: bool, until: asyncio.Future[Any] | None, limit: float) -> None:
        """Close sessions as 1012, those that wait for an answer made here last, until a task has ended or `limit`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        while loop.time() < deadline and (len(self.registry) > 0 if until is None else not until.done()):
            for session in self.registry:
                if not only_idle or self._is_idle(session):
                    session.close(CloseCode.DRAINING, Text.DRAINING)
            await asyncio.sleep(_TICK)


async def kept_running(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a background task, again and again if it fails: nothing that others have written may end the node."""
    told = ""
    while True:
        try:
            await run()
        except NodeTaken:
            raise
        except Exception as error:
            if (what := f"{type(error).__name__}: {error}") != told:
                told = what
                log.exception("background task failed and is started again", task=name)
            await asyncio.sleep(_RESTART)
        else:
            return


@asynccontextmanager
async def open_node(settings: Settings, backend: Backend | None = None) -> AsyncIterator[Node]:
    """Build a node with its connections; on leaving, close them. `backend` replaces the one of the settings."""
    access_log = AccessLog()
    readers = Readers(_reader(settings, access_log), _reader(settings, access_log))
    try:
        async with RedisClient(
            settings.redis_url,
            connections=settings.redis_connections,
            timeout=settings.redis_timeout,
            access_log=access_log,
        ) as redis:
            if backend is not None:
                yield Node(settings, backend, redis, readers)
            else:
                async with OpenAIBackend(settings) as own:
                    yield Node(settings, own, redis, readers)
    finally:
        await readers.requests.aclose()
        await readers.inbox.aclose()


def _reader(settings: Settings, access_log: AccessLog) -> BlockingReader:
    return BlockingReader(
        settings.redis_url, block=settings.read_block, timeout=settings.redis_timeout, access_log=access_log
    )


async def serve(settings: Settings, backend: Backend | None = None) -> None:
    """Serve one node until SIGTERM or SIGINT, then drain it. SIGHUP has it reload what it can."""
    async with open_node(settings, backend) as node:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, node.shut_down)
        loop.add_signal_handler(signal.SIGHUP, node.reload)
        await node.serve()


def run(settings: Settings) -> None:
    """Run one node in this process, on uvloop. Returns after it was told to end and has drained."""
    import uvloop  # noqa: PLC0415 - not there on every system that can import this module

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as long as there is no node that could reload anything
    logs.configure(settings)
    _tune_garbage_collector()
    uvloop.run(serve(settings))


def _tune_garbage_collector() -> None:
    """Look for cycles rarely, and never among the modules: it took 7 % of a busy node's CPU to find next to none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
