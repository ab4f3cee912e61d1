"""The composition root: builds all parts of one node, starts them, and drains them in order."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from imstream import __version__
from imstream.ai.prompt.assembler import PromptAssembler
from imstream.ai.prompt.prompter import Prompter
from imstream.ai.router import Backends
from imstream.codes import CloseCode, Code
from imstream.errors import NodeTaken, SettingsError, StoreError
from imstream.frame_parser import FrameLimits
from imstream.gateway.app import make_app, make_metrics_app
from imstream.gateway.busy_log import BusyLog
from imstream.gateway.connection import serve_socket
from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.presence import Presence
from imstream.gateway.registry import CLOSE_GRACE, Registry
from imstream.gateway.reply_sync import InboxConsumer, ReplySync
from imstream.gateway.server import GatewayServer, HttpServer, metrics_server
from imstream.gateway.session_deps import SessionDeps
from imstream.guards.chain import GuardChain
from imstream.guards.guard import GuardDeps
from imstream.metrics import Metrics
from imstream.model import NEWEST_VERSION
from imstream.redis import health
from imstream.redis.client import BlockingReader, RedisClient
from imstream.redis.errors import AccessLog, retry_until_available
from imstream.reply_buffer import ReplyBuffers
from imstream.settings import Settings
from imstream.store.dead_letters import DeadLetterBounds
from imstream.store.inbox import Inbox, NodeLeft, Routes
from imstream.store.leases import Leases
from imstream.store.nodes import BackendStates
from imstream.store.pauses import Pauses
from imstream.store.replies import ReplyStore
from imstream.store.requests import RequestStream
from imstream.texts import Text
from imstream.tracing import Tracing
from imstream.worker.account import RequestLog
from imstream.worker.adoption import Adopter
from imstream.worker.attempt import WorkerDeps
from imstream.worker.consumer import StreamConsumer
from imstream.worker.disposition import Limits
from imstream.worker.jobs import Jobs
from imstream.worker.lease_keeper import LeaseKeeper, StallDetector
from imstream.worker.pausing import PauseFollower

log = structlog.get_logger()

_MISSED_ROUNDS = 4  # rounds of the consumer loop that may be missed before the node counts as stuck
_RESTART_PAUSE = 1.0  # seconds before a background task that has failed is started again
PUBLISH_INTERVAL = 2.0  # seconds between two looks at the states of the backends
_RECHECK_INTERVAL = 0.5  # seconds between two looks for backends that may be back
_POLL_INTERVAL = 0.05  # seconds between two polls of a state that has no event of its own


class Node:
    """One node. `serve` runs it until `shut_down` is called; then it drains and returns."""

    def __init__(self, settings: Settings, backends: Backends, tracing: Tracing | None = None) -> None:
        self.settings = settings
        tracing = tracing or Tracing()
        self._max_round = (settings.read_block + 2 * settings.redis_timeout).total_seconds()
        """Maximum seconds of one round of the consumer loop: a blocked read and two slow commands."""
        self.metrics = metrics = Metrics()
        self._backends = backends
        self._stopping = asyncio.Event()
        self._reloading = asyncio.Event()
        url, timeout = settings.redis_url, settings.redis_timeout
        access = AccessLog(on_refusal=lambda lack: metrics.redis_refusals.update((lack,)))
        self._redis = redis = RedisClient(
            url,
            connections=settings.redis_connections,
            timeout=timeout,
            access_log=access,
            on_roundtrip=metrics.redis_roundtrip.observe,
        )
        request_reader, inbox_reader = self._readers = [
            BlockingReader(url, block=settings.read_block, timeout=timeout, access_log=access) for _ in range(2)
        ]
        dead_letters = DeadLetterBounds(redis, settings, count_dropped=metrics.dead_letters_dropped.inc)
        self._requests = requests = RequestStream(redis, request_reader, settings, metrics=metrics)
        self._leases = leases = Leases(redis, settings, metrics)
        leases.status = self._status
        self._inbox = inbox = Inbox(redis, inbox_reader, settings)
        self._pauses = pauses = Pauses(redis, settings)
        replies = ReplyStore(redis, settings)
        self.buffers = buffers = ReplyBuffers()
        self.registry = registry = Registry(settings, metrics)
        self.lease_keeper = lease_keeper = LeaseKeeper(leases, settings)
        self.jobs = jobs = Jobs(settings, backends=backends, replies=replies, buffers=buffers, inbox=inbox)
        assembler = PromptAssembler(settings)
        guard_deps = GuardDeps(settings=settings, redis=redis, inbox=inbox, assembler=assembler)
        self._guards = guards = GuardChain.create(guard_deps)
        worker_deps = WorkerDeps(
            settings=settings,
            limits=Limits.of(settings),
            replies=replies,
            buffers=buffers,
            inbox=inbox,
            guards=guards,
            prompter=Prompter(settings, assembler),
            backends=backends,
            leases=leases,
            pauses=pauses,
            lease_keeper=lease_keeper,
            stall=StallDetector(
                min(settings.redis_timeout, settings.lease).total_seconds(), on_tick=metrics.loop_lag.observe
            ),
            tracing=tracing,
            on_begun=registry.follow_new,
            metrics=metrics,
            request_log=RequestLog(settings.node, metrics, registry.followers),
        )

        def make_consumer(node: str) -> StreamConsumer:
            stream = RequestStream(redis, request_reader, settings, node=node, metrics=metrics)
            return StreamConsumer(stream, worker_deps, jobs)

        self.consumer = StreamConsumer(requests, worker_deps, jobs)
        scheduler = FlushScheduler()
        backends.rollup.on_turn = scheduler.flush
        jobs.line.is_paused = lambda: backends.is_closed or self.consumer.stopping
        self.adopter = Adopter(worker_deps, make_consumer)
        reply_sync = ReplySync(interval=settings.sweep_interval, replies=replies, buffers=buffers, registry=registry)
        presence = Presence(
            one_session=settings.sessions == "one",
            routes=Routes(redis, settings),
            inbox=inbox,
            registry=registry,
            guards=guards,
        )
        inbox_consumer = InboxConsumer(
            inbox=inbox,
            reply_sync=reply_sync,
            presence=presence,
            jobs=jobs,
            consumer=self.consumer,
            adopter=self.adopter,
            on_drain=self._drain_on_request,
        )
        session_deps = SessionDeps(
            settings=settings,
            frame_limits=FrameLimits(settings.max_depth, settings.max_history),
            guards=guards,
            requests=requests,
            dead_letters=dead_letters,
            replies=replies,
            buffers=buffers,
            inbox=inbox,
            pauses=pauses,
            consumer=self.consumer,
            jobs=jobs,
            registry=registry,
            presence=presence,
            reply_sync=reply_sync,
            scheduler=scheduler,
            metrics=metrics,
            busy_log=BusyLog(),
            tracing=tracing,
            not_ready=self.not_ready,
        )
        app = make_app(session_deps, stuck=self.stuck)
        self._metrics_app = make_metrics_app(session_deps, stuck=self.stuck)
        self._server = GatewayServer(app, settings, partial(serve_socket, deps=session_deps))
        self._servers: list[HttpServer] = [self._server]
        metrics.on_scrape = self._set_gauges
        self._background: dict[str, Callable[[], Awaitable[None]]] = {
            "lease": lambda: lease_keeper.run(self._server.address),
            "stall": worker_deps.stall.run,
            "registry": registry.run,
            "presence": presence.run,
            "reply-sync": reply_sync.run,
            "inbox": inbox_consumer.run,
            "flusher": jobs.flush_periodically,
            "waiting-line": jobs.line.run,
            "backends": self._publish_backends,
            "backend-checks": self._recheck_backends,
            "announce": self._announce,
            "reload": self._reload_on_request,
            "pauses": PauseFollower(pauses, jobs, lease_keeper, settings).run,
        }

    def not_ready(self) -> str | None:
        """Return why the node cannot serve now; None when it can."""
        if self._stopping.is_set():
            return "draining"
        if not self.consumer.reached_redis_within(self._max_round):
            return self.consumer.redis_problem
        return None if self.lease_keeper.held else "the lease is not held"

    def _status(self) -> dict[str, str | int]:
        """The state of this node for `imstream nodes`, and the address of its metrics for `imstream top`."""
        # No pause is confirmed before the first read: if it finds no pause, requests begin at once.
        pause = self._pauses.own if self._pauses.is_known else None
        return {
            "version": __version__,
            "sessions": len(self.registry),
            "running": len(self.jobs),
            "not_ready": self.not_ready() or "",
            "metrics": self._servers[-1].address if len(self._servers) > 1 or self.settings.shows_metrics_here else "",
            "reads": NEWEST_VERSION,
            "queue_limit": self.settings.queue_limit,
            "user_limit": self.settings.user_limit,
            "paused": "" if pause is None else pause.about,
        }

    def stuck(self) -> str | None:
        """Return why the node needs a restart; None when it works or may recover."""
        return None if self.consumer.looped_within(_MISSED_ROUNDS * self._max_round) else "the consumer loop is stuck"

    def _set_gauges(self) -> None:
        metrics, running = self.metrics, defaultdict[str, list[str]](list)
        for job in self.jobs:
            running[job.stream.node].append(job.entry.entry_id)
        streams = (self.settings.node, *self.adopter.adopted)
        metrics.set_streams(running, {stream: self._pauses.of(stream) is not None for stream in streams})
        metrics.set_breakers({one.name: one.gate.breaker.tripped for one in self._backends})
        metrics.sessions.set(len(self.registry))
        metrics.redis_up.set(self.lease_keeper.reaches_redis)  # the consumer may hang, or be stopped
        metrics.lease_held.set(self.lease_keeper.held)

    def reload(self) -> None:
        """Reload the data that can change while the node runs."""
        self._reloading.set()

    def shut_down(self) -> None:
        """Drain, then stop."""
        self._stopping.set()

    def _drain_on_request(self, instance: str) -> None:
        """Drain, unless the notice is for an earlier process of this node."""
        if instance in {"", self.lease_keeper.instance} and not self._stopping.is_set():
            log.warning("an operator has this node drain")
            self.shut_down()

    async def serve(self) -> None:
        """Serve until `shut_down`. Raises `SettingsError` if it cannot listen, `NodeTaken` if the lease is taken."""
        taken: BaseException | None = None
        async with self._readers[0], self._readers[1], self._redis:
            self._server.listen()
            if (metrics := metrics_server(self._metrics_app, self.settings, node_port=self._server.port)) is not None:
                metrics.listen()
                self._servers.append(metrics)
            try:
                async with self._guards.running(), asyncio.TaskGroup() as group:
                    await self._serve(group)
            except* NodeTaken as refusal:
                taken = refusal
        # There is only one. Outside, because an error raised in `except*` becomes a group again (in Python 3.11.2).
        while isinstance(taken, BaseExceptionGroup):
            taken = taken.exceptions[0]
        if taken is not None:
            raise taken

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        background = [group.create_task(keep_running(name, run), name=name) for name, run in self._background.items()]
        working = [
            group.create_task(self.consumer.run(), name="worker"),
            group.create_task(keep_running("adopter", self.adopter.run), name="adopter"),
        ]
        serving = [group.create_task(one.serve(), name="server") for one in self._servers]
        await self._stopping.wait()
        background.append(group.create_task(self._record_stop(), name="record-stop"))
        await asyncio.sleep(0)  # before anything else: a process manager may be stopping Redis, too
        await self._drain(working)
        for one in self._servers:
            one.stop()  # only now: uvicorn then closes every socket at once
        await asyncio.wait(serving)
        for task in (*background, *working):
            task.cancel()

    async def _announce(self) -> None:
        while not self._server.started or self.not_ready() is not None:  # noqa: ASYNC110 - states of two parts
            await asyncio.sleep(_POLL_INTERVAL)
        addresses = dict(zip(("address", "metrics"), (one.address for one in self._servers), strict=False))
        log.info("ready", node=self.settings.node, **addresses)
        for warning in await health.warnings(self._redis):
            log.warning(warning)
        await self._backends.check()

    async def _publish_backends(self) -> None:
        """Keep the states of the backends in Redis, for `imstream backends`."""
        states = BackendStates(self._redis, self.settings)
        while True:
            await asyncio.sleep(PUBLISH_INTERVAL)
            await self._backends.close_retired()
            with suppress(StoreError):  # the next round tries again
                await states.publish(self._backends.states())

    async def _recheck_backends(self) -> None:
        while True:
            await asyncio.sleep(_RECHECK_INTERVAL)
            await self._backends.recheck()

    async def _reload_on_request(self) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            reloaded = await self._guards.reload()
            try:
                if await self._backends.reload():
                    reloaded.append("backends")
            except SettingsError as error:
                log.error("backends not reloaded, the previous ones stay", error=str(error))  # noqa: TRY400 - no defect
            log.info("reloaded" if reloaded else "nothing to reload", what=reloaded)
            if "backends" in reloaded:
                await self._backends.check()

    async def _drain(self, working: list[asyncio.Task[None]]) -> None:
        """Let running answers end, hand back the rest, close the sessions, and let other nodes take over."""
        log.info("draining", running=len(self.jobs), sessions=len(self.registry))
        self.consumer.stop()
        self.adopter.stop()
        all_work = asyncio.gather(*working, return_exceptions=True)
        await self._close_sessions(only_idle=True, until=all_work, limit=self.settings.drain_grace.total_seconds())
        self.jobs.drain()
        await asyncio.wait([all_work], timeout=self.settings.redis_timeout.total_seconds())
        unfinished = self.jobs.unfinished()  # of adopted streams, only those that were begun here
        try:
            unfinished[self.settings.node] = await self._requests.unfinished()
        except StoreError as error:
            log.warning("requests of the stream cannot be counted", error=str(error))
        await self.lease_keeper.release()
        with suppress(StoreError):  # without the notice, others adopt the stream at their next scan
            await self._inbox.notify(await self._leases.other_nodes(), NodeLeft(self.settings.node))
        await self._close_sessions(only_idle=False, until=None, limit=CLOSE_GRACE)
        log.info("drained", unfinished=unfinished.total(), sessions=len(self.registry))

    async def _record_stop(self) -> None:
        """Record that this process is stopping: however it ends, this does not count as a death of their worker."""
        stopping = retry_until_available(self.lease_keeper.mark_stopping)
        recorded, _ = await asyncio.gather(stopping, self.jobs.uncount_deliveries(), return_exceptions=True)
        if isinstance(recorded, Exception):
            log.warning("shutdown is not recorded in the lease", error=str(recorded))

    async def _close_sessions(self, *, only_idle: bool, until: asyncio.Future[Any] | None, limit: float) -> None:
        """Close sessions with 1012 for `limit` seconds; with `only_idle`, those waiting for no answer of this node."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        while loop.time() < deadline and (len(self.registry) > 0 if until is None else not until.done()):
            for session in self.registry:
                user_id, followed = session.user_id, session.writer.followed
                waits = user_id is not None and any(self.jobs.find(user_id, message_id) for message_id in followed)
                if not (only_idle and waits):
                    session.close(CloseCode.DRAINING, Code.DRAINING, Text.DRAINING)
            await asyncio.sleep(_POLL_INTERVAL)


async def keep_running(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a background task, and restart it when it fails: data written by others must not end the node."""
    last_error = ""
    while True:
        try:
            return await run()
        except NodeTaken:
            raise
        except Exception as error:
            if (text := f"{type(error).__name__}: {error}") != last_error:
                last_error = text
                log.exception("background task failed and is started again", task=name)
            await asyncio.sleep(_RESTART_PAUSE)
