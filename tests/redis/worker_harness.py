"""A worker in this process, on a real server, with an AI backend that the test controls.

A test admits a request (`worker.ask`), as the gateway does; waits for the AI call (`worker.backend.call`); streams text
and ends the call (`call.send`, `call.done`, `call.fail`); waits until all is finished (`worker.idle`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import redis

from imstream.ai.backend import Completion, PromptMessage
from imstream.ai.dialect import Written
from imstream.ai.prompt.assembler import PromptAssembler
from imstream.ai.prompt.prompter import Prompter
from imstream.ai.router import Backends
from imstream.ai.upstream import Upstream
from imstream.gateway.cursor import Cursor, ReplyEnded, TextGrown, TextReset
from imstream.guards.chain import GuardChain
from imstream.keys import GROUP, Keys
from imstream.metrics import Metrics
from imstream.model import Terminal
from imstream.redis.client import BlockingReader, RedisClient
from imstream.reply_buffer import ReplyBuffer, ReplyBuffers
from imstream.settings import Settings
from imstream.store.inbox import Inbox
from imstream.store.leases import Leases
from imstream.store.pauses import Pauses
from imstream.store.replies import ReplyStore
from imstream.store.requests import Admitted, RequestStream
from imstream.store.scripts import LUA
from imstream.tracing import Tracing
from imstream.worker.account import RequestLog
from imstream.worker.adoption import Adopter
from imstream.worker.attempt import WorkerDeps
from imstream.worker.consumer import StreamConsumer
from imstream.worker.disposition import Limits
from imstream.worker.jobs import Jobs
from imstream.worker.lease_keeper import LeaseKeeper, StallDetector
from imstream.worker.pausing import PauseFollower
from tests.redis.conftest import chat_request
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

USER = 10001

QUICK: dict[str, Any] = {
    "redis_timeout": "1s",
    "read_block": "50ms",
    "sweep_interval": "100ms",
    "flush_interval": "20ms",
    "retry_wait": "10ms",
    "user_limit": 100,
}
"""Settings for quick tests."""


@dataclass
class Call:
    """A running AI call.

    Attributes:
        send: Passes a piece of text to the worker.
        at: Loop time at which it began.
        cancelled: Whether the worker has cancelled it.
    """

    messages: Sequence[PromptMessage]
    send: Callable[[str], None]
    outcome: asyncio.Future[Completion]
    at: float
    think: Callable[[str], None] | None = None
    written: Written | None = None
    cancelled: bool = False

    def done(self, *pieces: str, finish_reason: str = "stop", usage: dict[str, int] | None = None) -> None:
        """Send the rest; the answer is complete."""
        for piece in pieces:
            self.send(piece)
        self.outcome.set_result(Completion(finish_reason, usage))

    def fail(self, error: Exception) -> None:
        """The call fails."""
        self.outcome.set_exception(error)


class PlayedBackend:
    """A backend whose calls are answered by the test; with `always`, each is answered at once."""

    def __init__(self, name: str = "played") -> None:
        self.name = name
        self.calls: list[Call] = []
        self.always: Callable[[Call], None] | None = None

    async def answer(
        self,
        messages: Sequence[PromptMessage],
        *,
        on_text: Callable[[str], None],
        on_reasoning: Callable[[str], None] | None = None,
        written: Written | None = None,
    ) -> Completion:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        call = Call(messages, on_text, loop.create_future(), loop.time(), on_reasoning, written)
        self.calls.append(call)
        if self.always is not None:
            self.always(call)
        try:
            return await call.outcome
        except asyncio.CancelledError:
            call.cancelled = True
            raise

    async def call(self, number: int) -> Call:
        """Wait for a call, numbered from 1."""
        await wait_until(lambda: len(self.calls) >= number, f"AI call {number} is made")
        return self.calls[number - 1]


class Follower:
    """Reads a reply as a socket and its client do; `text` is what the client shows."""

    def __init__(self, reply: ReplyBuffer, *, attempt: int = 0, offset: int = 0, text: str = "") -> None:
        self.text = text
        self.restarts = 0
        self.terminal: Terminal | None = None
        self._cursor = Cursor(reply, attempt=attempt, offset=offset)
        reply.subscribe(self.wake)
        self.wake(reply)

    def wake(self, _: ReplyBuffer) -> None:
        """Read all that is new."""
        while self.terminal is None and (step := self._cursor.advance()) is not None:
            match step:
                case TextReset():
                    self.text, self.restarts = "", self.restarts + 1
                case TextGrown(_, text, offset):
                    self.text += text
                    assert len(self.text) == offset
                case ReplyEnded(_, offset, terminal):
                    assert len(self.text) == offset
                    self.terminal = terminal

    async def end(self) -> str:
        """Wait for the terminal event, and return its name."""
        await wait_until(lambda: self.terminal is not None, "the follower sees the end")
        assert self.terminal is not None
        return self.terminal.event


@dataclass
class WorkerHarness:
    """The worker of one process. It serves the requests of node 0: as that node, or as its adopter.

    Attributes:
        redis: A client of the test. Any, because its types are unions of all replies.
        begun: Ids of the messages whose first attempt began here.
    """

    settings: Settings
    redis: Any
    backend: PlayedBackend
    requests: RequestStream
    replies: ReplyStore
    buffers: ReplyBuffers
    consumer: StreamConsumer
    jobs: Jobs
    adopter: Adopter
    lease_keeper: LeaseKeeper
    pauses: Pauses
    begun: list[str]
    upstream: Upstream
    metrics: Metrics
    keys: Keys = field(default_factory=Keys)
    running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the worker."""
        self.running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            around = [
                group.create_task(self.lease_keeper.run("here")),
                group.create_task(self.jobs.flush_periodically()),
                group.create_task(PauseFollower(self.pauses, self.jobs, self.lease_keeper, self.settings).run()),
            ]
            adopting = group.create_task(self.adopter.run())
            await self.consumer.run()
            self.adopter.stop()
            await adopting
            for task in around:
                task.cancel()

    async def stop(self) -> None:
        """Stop gracefully: running requests are handed back."""
        if self.running is not None:
            self.consumer.stop()
            self.adopter.stop()
            self.jobs.drain()
            await self.running
            await self.lease_keeper.release()
            self.running = None

    async def crash(self) -> None:
        """Stop like a killed process, at any point."""
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.running = None

    async def ask(self, message_id: str = "m", *, user: int = USER, **fields: Any) -> str:  # noqa: ANN401 - any field
        """Admit a request; return its entry id."""
        verdict = await self.requests.admit(replace(chat_request(user, message_id), **fields))
        assert isinstance(verdict, Admitted)
        await self.replies.mark_queued(user, message_id, request=self.requests.request_id(verdict.entry_id))
        return verdict.entry_id

    def follow(self, message_id: str = "m", *, user: int = USER, **where: Any) -> Follower:  # noqa: ANN401 - see there
        """Follow a reply as a socket does."""
        return Follower(self.buffers.get(user, message_id), **where)

    def consumers(self, node: str = "0") -> list[str]:
        """The nodes in the consumer group of a stream."""
        return sorted(row["name"] for row in self.redis.xinfo_consumers(self.keys.requests(node), GROUP))

    def entries(self, message_id: str = "m", *, user: int = USER) -> list[dict[str, str]]:
        """The entries of the reply stream."""
        return [fields for _, fields in self.redis.xrange(self.keys.reply(user, message_id))]

    def attempts(self, message_id: str = "m", *, user: int = USER) -> list[int]:
        """The attempts that were opened."""
        entries = self.entries(message_id, user=user)
        return [int(entry["attempt"]) for entry in entries if entry["event"] == "opened"]

    def recorded(self, message_id: str = "m", *, user: int = USER) -> tuple[str, str]:
        """The only terminal event of a reply, and the text of its last attempt."""
        entries = self.entries(message_id, user=user)
        ends = [entry for entry in entries if entry["event"] in ("done", "failed", "cancelled")]
        assert len(ends) == 1, f"{len(ends)} terminal events"
        assert ends[0] is entries[-1]
        return ends[0]["event"], self.recorded_text(message_id, user=user)

    def recorded_text(self, message_id: str = "m", *, user: int = USER) -> str:
        """The text of the last attempt so far."""
        entries = self.entries(message_id, user=user)
        return "".join(entry.get("text", "") for entry in entries if entry["attempt"] == entries[-1]["attempt"])

    def dead(self) -> list[dict[str, str]]:
        """The dead letters."""
        return [fields for _, fields in self.redis.xrange(self.keys.dead("0"))]

    def pending(self) -> dict[str, int]:
        """Deliveries of pending entries, by entry id."""
        try:
            rows = self.redis.xpending_range(self.keys.requests("0"), GROUP, "-", "+", 1000)
        except redis.ResponseError:  # no group yet
            return {}
        return {row["message_id"]: row["times_delivered"] for row in rows}

    async def reads(self) -> None:
        """Wait until the worker waits for new requests."""
        await wait_until(self._is_reading, "a read is blocked")

    async def no_longer_reads(self) -> None:
        """Wait until the worker reads no new requests, and its last read has ended."""
        await wait_until(lambda: not self._is_reading(), "no read is blocked")

    def _is_reading(self) -> bool:
        return any(one["cmd"] == "xreadgroup" and "b" in one["flags"] for one in self.redis.client_list())

    async def load_scripts(self) -> None:
        """Load all scripts into Redis: their next calls are the first with their digests. Then wait until it reads."""
        with self.redis.pipeline(transaction=False) as all_of_them:
            for script in LUA.values():
                all_of_them.script_load(script.text)
            all_of_them.execute()
        await self.reads()

    async def idle(self) -> None:
        """Wait until all requests are finished."""
        await wait_until(lambda: self.redis.xlen(self.keys.requests("0")) == 0, "no request is unfinished")
        await wait_until(lambda: self.pending() == {}, "nothing is pending")
        await wait_until(lambda: len(self.jobs) == 0, "no job is left")
        assert not self.redis.exists(self.keys.load("0"))


@asynccontextmanager
async def run_worker(  # noqa: PLR0913 - each has a default
    server: RedisServer,
    *,
    backend: PlayedBackend | None = None,
    others: Sequence[PlayedBackend] = (),
    guards: GuardChain | None = None,
    url: str | None = None,
    start: bool = True,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[WorkerHarness]:
    """Build and start the worker of a process; stop it at the end.

    Args:
        server: Its Redis.
        backend: Its AI; default: a new one.
        others: Further backends.
        guards: Its guards; default: none.
        url: URL of a proxy to Redis.
        start: Whether it starts at once.
        settings: Overrides of `QUICK`.
    """
    known = Settings.load(redis_url=url or server.url, **{"node": "0", **QUICK, **settings})
    backend = backend or PlayedBackend()
    reader = BlockingReader(known.redis_url, block=known.read_block, timeout=known.redis_timeout)
    async with RedisClient(known.redis_url, connections=2, timeout=known.redis_timeout) as redis_client:
        with server.client() as client:
            worker = _build(known, redis_client, reader, client, [backend, *others], guards or GuardChain())
            if start:
                worker.start()
            try:
                yield worker
            finally:
                await worker.stop()
                await reader.aclose()


def _build(  # noqa: PLR0913, PLR0917 - all dependencies
    known: Settings,
    redis_client: RedisClient,
    reader: BlockingReader,
    client: Any,  # noqa: ANN401 - see `WorkerHarness`
    played: Sequence[PlayedBackend],
    guards: GuardChain,
) -> WorkerHarness:
    requests, replies = RequestStream(redis_client, reader, known), ReplyStore(redis_client, known)
    buffers, begun, metrics = ReplyBuffers(), list[str](), Metrics()
    inbox, leases = Inbox(redis_client, reader, known), Leases(redis_client, known, metrics)
    backends = Backends(known, *played)
    jobs = Jobs(known, backends=backends, replies=replies, buffers=buffers, inbox=inbox)
    deps = WorkerDeps(
        settings=known,
        limits=Limits.of(known),
        replies=replies,
        buffers=buffers,
        inbox=inbox,
        guards=guards,
        prompter=Prompter(known, PromptAssembler(known)),
        backends=backends,
        leases=leases,
        pauses=Pauses(redis_client, known),
        lease_keeper=LeaseKeeper(leases, known),
        stall=StallDetector(known.lease.total_seconds()),
        tracing=Tracing(),
        on_begun=lambda reply: begun.append(reply.message_id),
        metrics=metrics,
        request_log=RequestLog(known.node, metrics, lambda _: (0, 0)),
    )

    def make_consumer(node: str) -> StreamConsumer:
        return StreamConsumer(RequestStream(redis_client, reader, known, node=node), deps, jobs)

    return WorkerHarness(
        settings=known,
        redis=client,
        backend=played[0],
        requests=requests,
        replies=replies,
        buffers=buffers,
        consumer=StreamConsumer(requests, deps, jobs),
        jobs=jobs,
        adopter=Adopter(deps, make_consumer),
        lease_keeper=deps.lease_keeper,
        pauses=deps.pauses,
        upstream=next(iter(backends)),
        begun=begun,
        metrics=metrics,
    )
