"""The store as a whole: nodes admit, take, answer, crash, freeze, come back and adopt, in any order (I1 to I5, I7).

The machine does what workers do, step by step, and may stop between any two steps. A dead process may be frozen: it
continues where it stopped, long after another worker has claimed its request.
"""

# ruff: noqa: D102 - the rules of the state machine have sentences for names

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from imstream.keys import GROUP, Keys
from imstream.model import ChatRequest, Terminal
from imstream.redis.client import BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.leases import Leases
from imstream.store.replies import Appended, Ended, Opened, Rejected, ReplyStore
from imstream.store.requests import Admitted, Entry, QueueFull, RequestStream
from imstream.user_ids import UserId
from imstream.worker.disposition import Limits, before_start
from tests.redis.conftest import chat_request, examples_on
from tests.support.reply_model import TERMINAL, ReplyModel, Said
from tests.support.servers import RedisServer

NODES = ("0", "1", "2")
USERS = (10001, 10002)
MESSAGES = ("a", "b")
NODE_CAP, USER_CAP, MAX_DELIVERIES = 4, 3, 2
LIMITS = Limits(attempts=99, deliveries=MAX_DELIVERIES, window=timedelta(days=1))
DONE = Terminal("done", "stop")
FAILED = Terminal("failed", reason="http_503")
LONGEST = 40
CONTINUING = frozenset({"0", "1"})
"""Nodes with a backend that can continue an answer."""

node_names = st.sampled_from(NODES)
RARELY = st.sampled_from([False, False, False, True])
"""For steps that end things: otherwise hardly any request would proceed."""

users = st.sampled_from(USERS)
messages = st.sampled_from(MESSAGES)


AGAIN, CANCEL = "again", "cancel"
STEPS: st.SearchStrategy[int | Terminal | str] = st.sampled_from([0, 1, 2, 3, 1, 2, 3, DONE, FAILED, AGAIN, CANCEL])


def text_of(attempt: int) -> str:
    """The text of an attempt. No two attempts share a character."""
    return "".join(chr(0x4E00 + 100 * attempt + index) for index in range(LONGEST))


@dataclass
class Unfinished:
    """A request that was accepted and has not ended. `deliveries` is 0 until a worker has it."""

    user: UserId
    message: str
    deliveries: int = 0
    consumer: str = ""


@dataclass(eq=False)
class Job:
    """The work of one node on one request.

    Attributes:
        stream: The node whose stream it is from.
        by: The node that works on it.
        attempt: Its attempt; 0 before the first.
        recorded: Number of recorded characters.
        then: The step that remains when the end is recorded.
    """

    stream: str
    by: str
    entry: Entry
    request: ChatRequest
    attempt: int = 0
    recorded: int = 0
    then: Callable[[], Coroutine[Any, Any, object]] | None = None

    @property
    def request_id(self) -> str:
        return f"{self.stream}/{self.entry.entry_id}"


@dataclass
class Site:
    """Connections to one server."""

    runner: asyncio.Runner
    redis_client: RedisClient
    reader: BlockingReader
    redis: Any  # redis-py's return types are unions of all shapes

    def settings_of(self, node: str) -> Settings:
        """The settings of one node."""
        given = {"node": node, "queue_limit": NODE_CAP, "user_limit": USER_CAP}
        return Settings.load(**given)


class StoreUsed(RuleBasedStateMachine):
    """Three nodes, and two users who send the same messages to any of them, repeatedly."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._run = site.runner.run
        self._redis = site.redis
        self._redis.flushall()  # of the previous run
        self._keys = Keys()
        known = {node: site.settings_of(node) for node in NODES}
        self._replies = {node: ReplyStore(site.redis_client, known[node]) for node in NODES}
        # By the node of the stream and the node that works on it.
        self._streams = {
            (of, by): RequestStream(site.redis_client, site.reader, known[by], node=of) for of in NODES for by in NODES
        }
        self._leases = {node: Leases(site.redis_client, known[node]) for node in NODES}
        self._alive: set[str] = set()
        self._adopters: dict[str, str] = {}
        self._unfinished: dict[str, dict[str, Unfinished]] = {node: {} for node in NODES}
        self._buried = Counter[str]()
        self._models: dict[tuple[UserId, str], ReplyModel] = {}
        self._jobs: list[Job] = []
        self._frozen: list[Job] = []

    # Gateway

    @initialize(asked=st.lists(st.tuples(node_names, users, messages), max_size=6))
    def the_nodes_start(self, asked: list[tuple[str, int, str]]) -> None:
        for node, user, message in asked[:2]:
            self._ask(node, user, message, marked=False)
        for node in NODES:
            assert self._run(self._streams[node, node].ensure_group()) is True
            self._start_process(node)
        for node, user, message in asked[2:]:
            self._ask(node, user, message, marked=True)

    @rule(
        node=node_names,
        user=users,
        message=messages,
        marked=st.booleans(),
        then=st.sampled_from(["taken", "cancelled", ""]),
    )
    def a_user_asks(self, node: str, user: UserId, message: str, *, marked: bool, then: str) -> None:
        """The gateway may die before it marks the message as queued."""
        if node not in self._alive:
            return
        self._ask(node, user, message, marked=marked)
        if then == "cancelled":
            self._cancel(user, message)
        elif then == "taken" and self._waiting(node):
            self._take(node, node, 1)

    def _ask(self, node: str, user: UserId, message: str, *, marked: bool) -> None:
        verdict = self._run(self._streams[node, node].admit(chat_request(user, message)))
        unfinished = self._unfinished[node]
        if len(unfinished) >= NODE_CAP:
            assert verdict == QueueFull(by_user=False)
            return
        if sum(one.user == user for one in unfinished.values()) >= USER_CAP:
            assert verdict == QueueFull(by_user=True)
            return
        waiting = sum(not one.consumer for one in unfinished.values())
        assert isinstance(verdict, Admitted)
        assert verdict.position == waiting + 1
        unfinished[verdict.entry_id] = Unfinished(user, message)
        model = self._models.setdefault((user, message), ReplyModel())
        if marked:
            self._run(self._replies["0"].mark_queued(user, message))
            model.mark_queued()

    def _cancel(self, user: UserId, message: str) -> None:
        model = self._models.get((user, message), ReplyModel())
        assert self._run(self._replies["0"].cancel(user, message)) == model.cancel()

    # Workers

    @precondition(lambda self: any(self._waiting(node) for node in self._alive))
    @rule(data=st.data(), count=st.integers(1, 3))
    def a_worker_takes_requests(self, data: st.DataObject, count: int) -> None:
        node = data.draw(st.sampled_from(sorted(node for node in self._alive if self._waiting(node))), label="node")
        self._take(node, node, count)

    def _waiting(self, stream: str) -> list[str]:
        return [entry_id for entry_id, one in self._unfinished[stream].items() if not one.consumer]

    def _take(self, stream: str, by: str, count: int) -> None:
        waiting = self._waiting(stream)
        entries = self._run(self._streams[stream, by].read(count=count, block=None))
        assert [entry.entry_id for entry in entries] == waiting[:count]
        for entry in entries:
            self._start(stream, by, entry)

    @precondition(lambda self: any(self._to_claim(node, node) for node in self._alive))
    @rule(data=st.data())
    def a_worker_takes_up_what_was_left_in_its_stream(self, data: st.DataObject) -> None:
        node = data.draw(
            st.sampled_from(sorted(node for node in self._alive if self._to_claim(node, node))), label="node"
        )
        self._take_up(node, node)

    def _to_claim(self, stream: str, by: str) -> dict[str, int]:
        """Entries delivered to a worker that does not work on them, or to a dead node, with their deliveries."""
        at_work = self._at_work(stream, by)
        return {
            entry_id: one.deliveries
            for entry_id, one in self._unfinished[stream].items()
            if one.consumer and (one.consumer not in self._alive or one.consumer == by) and entry_id not in at_work
        }

    def _at_work(self, stream: str, by: str) -> set[str]:
        """Entries that are worked on. Entries of two streams may have the same id."""
        return {job.entry.entry_id for job in self._jobs if (job.stream, job.by) == (stream, by)}

    def _take_up(self, stream: str, by: str, *, node_is_back: bool = False) -> None:
        requests = self._streams[stream, by]
        pending = self._run(requests.pending(exclude=self._at_work(stream, by)))
        for consumer in self._run(requests.other_consumers()):
            if consumer not in self._alive:
                pending += self._run(requests.pending(consumer))
        assert {one.entry_id: one.deliveries for one in pending} == self._to_claim(stream, by)
        if node_is_back:
            self._start_process(stream)
        for one in pending:
            entry = self._run(requests.claim(one, deliveries=one.deliveries + 1))
            if node_is_back and one.consumer == stream:
                assert entry is None  # its node is alive again (I7)
            else:
                assert entry is not None
                self._start(stream, by, entry, deliveries=one.deliveries + 1)

    def _start(self, stream: str, by: str, entry: Entry, *, deliveries: int = 1) -> None:
        taken = {entry_id for node in NODES for entry_id in self._at_work(stream, node)}
        assert entry.entry_id not in taken  # no living node has it (I7)
        unfinished = self._unfinished[stream][entry.entry_id]
        unfinished.deliveries, unfinished.consumer = deliveries, by
        assert entry.deliveries == deliveries
        request = ChatRequest.from_fields(entry.fields)
        assert (request.user_id, request.message_id) == (unfinished.user, unfinished.message)
        self._jobs.append(Job(stream, by, entry, request))

    # Nodes

    @precondition(lambda self: self._jobs)
    @rule(data=st.data(), how=st.sampled_from(["killed", "frozen", "in good order"]), really=RARELY)
    def a_node_goes(self, data: st.DataObject, how: str, *, really: bool) -> None:
        if really:
            self._end_process(data.draw(st.sampled_from(sorted({job.by for job in self._jobs})), label="node"), how)

    def _end_process(self, node: str, how: str) -> None:
        """Its lease ends. A frozen process continues some time, long after others have replaced it."""
        for job in [job for job in self._jobs if job.by == node]:
            self._jobs.remove(job)
            if how == "frozen":
                self._frozen.append(job)
            elif how == "in good order":
                self._run(self._streams[job.stream, job.by].hand_back(job.entry))
                if (one := self._unfinished[job.stream].get(job.entry.entry_id)) is not None:
                    one.deliveries = job.entry.deliveries - 1
        self._alive.discard(node)
        self._redis.delete(self._keys.lease(node))
        for stream in [stream for stream, adopter in self._adopters.items() if adopter == node]:
            self._redis.delete(self._keys.adopter(stream))
            del self._adopters[stream]

    @precondition(lambda self: len(self._alive) < len(NODES))
    @rule(data=st.data())
    def a_node_starts_again(self, data: st.DataObject) -> None:
        self._start_process(data.draw(st.sampled_from(sorted(set(NODES) - self._alive)), label="node"))

    def _start_process(self, node: str) -> None:
        self._redis.set(self._keys.lease(node), "a process", ex=600)
        self._alive.add(node)
        assert self._run(self._streams[node, node].ensure_group()) is False

    @precondition(lambda self: self._alive)
    @rule(data=st.data(), stream=node_names, count=st.integers(1, 3), node_is_back=RARELY)
    def a_node_adopts_another(self, data: st.DataObject, stream: str, count: int, *, node_is_back: bool) -> None:
        """Or finds that the other node is alive or adopted. It may come back at that moment."""
        by = data.draw(st.sampled_from(sorted(self._alive)), label="by")
        if by == stream:
            return
        verdict = self._run(self._leases[by].adopt(stream))
        if stream in self._alive:
            assert verdict is None
            if self._adopters.get(stream) == by:
                self._release(stream, by)
        elif self._adopters.setdefault(stream, by) != by:
            assert verdict is None
        else:
            assert verdict == len(self._unfinished[stream])
            self._take_up(stream, by, node_is_back=node_is_back)
            if not node_is_back:
                self._take(stream, by, count)

    def _release(self, stream: str, by: str) -> None:
        clean = self._run(self._leases[by].release_stream(stream))
        assert clean == all(one.consumer != by for one in self._unfinished[stream].values())
        assert not self._redis.exists(self._keys.adopter(stream))
        del self._adopters[stream]

    # The steps of a worker

    @precondition(lambda self: self._jobs or self._frozen)
    @rule(data=st.data(), steps=st.lists(STEPS, min_size=1, max_size=4))
    def a_worker_goes_on(self, data: st.DataObject, steps: list[int | Terminal | str]) -> None:
        """Open; append, or retry; the user may cancel; append the end; finish."""
        job = data.draw(st.sampled_from(self._jobs + self._frozen), label="job")
        for step in steps:
            if job in self._jobs or job in self._frozen:
                self._step(job, step)

    def _step(self, job: Job, step: int | Terminal | str) -> None:
        if step == CANCEL:
            self._cancel(job.request.user_id, job.request.message_id)
        elif job.then is not None:
            self._run(job.then())
            self._drop(job)
        elif job.attempt == 0 or step == AGAIN:
            self._open(job)
        elif before_start(job.entry.deliveries, LIMITS) is not None:
            self._append(job, 0, FAILED)
        elif isinstance(step, Terminal):
            self._append(job, 1, step)
        else:
            self._append(job, int(step), None)

    def _open(self, job: Job) -> None:
        user, message = job.request.user_id, job.request.message_id
        how: dict[str, Any] = {"request": job.request_id, "after": job.attempt}
        if job.by in CONTINUING:
            how |= {"continues": LONGEST, "shown": job.recorded if job.attempt else None}
        verdict = self._run(self._replies[job.by].open(user, message, **how))
        assert verdict == self._models[user, message].open(**how, by=job.by)
        match verdict:
            case Opened(attempt, continued=continued):
                job.attempt, job.recorded = attempt, 0 if continued is None else len(continued.text)
            case Ended("failed", owner) if owner == job.request_id:
                job.then = self._burying(job)
            case _:
                job.then = self._finishing(job)

    def _append(self, job: Job, more: int, end: Terminal | None) -> None:
        user, message, after = job.request.user_id, job.request.message_id, min(job.recorded + more, LONGEST)
        given: dict[str, Any] = {
            "attempt": job.attempt,
            "before": job.recorded,
            "after": after,
            "text": text_of(job.attempt)[job.recorded : after],
            "terminal": end,
        }
        verdict = self._run(self._replies[job.by].append(user, message, **given))
        assert verdict == self._models[user, message].append(**given)
        match verdict:
            case Appended():
                job.recorded = after
                if end is not None:
                    job.then = self._burying(job) if end == FAILED else self._finishing(job)
            case Rejected("ended"):
                job.then = self._finishing(job)
            case _:
                assert verdict == Rejected("superseded")
                self._drop(job)

    def _finishing(self, job: Job) -> Callable[[], Coroutine[Any, Any, object]]:
        return lambda: self._streams[job.stream, job.by].finish(job.entry)

    def _burying(self, job: Job) -> Callable[[], Coroutine[Any, Any, object]]:
        async def bury() -> None:
            if job.entry.entry_id in self._unfinished[job.stream]:
                self._buried[job.stream] += 1
            await self._streams[job.stream, job.by].bury(job.entry, reason="x", error="y", attempts=job.attempt)

        return bury

    def _drop(self, job: Job) -> None:
        (self._jobs if job in self._jobs else self._frozen).remove(job)
        if job.then is not None:
            self._unfinished[job.stream].pop(job.entry.entry_id, None)

    # Invariants

    @invariant()
    def every_accepted_message_has_its_end_or_a_request(self) -> None:
        asked_for = {(one.user, one.message) for of_node in self._unfinished.values() for one in of_node.values()}
        for message, model in self._models.items():
            assert (model.last is not None and model.last.terminal is not None) or message in asked_for  # I1

    @invariant()
    def redis_shows_the_requests_that_are_unfinished(self) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            for node in NODES:
                pipeline.xrange(self._keys.requests(node))
                pipeline.xpending_range(self._keys.requests(node), GROUP, "-", "+", 100)
                pipeline.hgetall(self._keys.load(node))
                pipeline.xlen(self._keys.dead(node))
            answers = iter(pipeline.execute())
        for node, unfinished in self._unfinished.items():
            entries, pending, load, buried = (next(answers) for _ in range(4))
            assert len(entries) <= NODE_CAP  # I2
            assert [entry_id for entry_id, _ in entries] == list(unfinished)  # I3
            assert {row["message_id"]: (row["consumer"], row["times_delivered"]) for row in pending} == {
                entry_id: (one.consumer, one.deliveries) for entry_id, one in unfinished.items() if one.consumer
            }
            assert load == {str(user): str(n) for user, n in Counter(one.user for one in unfinished.values()).items()}
            assert buried == self._buried[node]

    @invariant()
    def every_reply_is_sound(self) -> None:
        for message, entries in self._entries().items():
            assert entries == [replace(entry, terminal=None) for entry in self._models[message].entries]
            assert not any(entry.event in TERMINAL for entry in entries[:-1])  # I4
            text = ""
            for entry in entries:  # I5
                if entry.event == "opened":
                    assert entry.text in {"", text}
                    text = entry.text
                else:
                    text += entry.text
                    assert text.endswith(text_of(entry.attempt)[entry.offset - len(entry.text) : entry.offset])
                assert entry.offset == len(text)

    def _entries(self) -> dict[tuple[UserId, str], list[Said]]:
        """The record of every message."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for user, message in self._models:
                pipeline.xrange(self._keys.reply(user, message))
            answers = pipeline.execute()
        return {
            message: [Said.read(fields) for _, fields in rows]
            for message, rows in zip(self._models, answers, strict=True)
        }

    def teardown(self) -> None:
        """Whatever happened, the nodes start again, and every accepted message is answered once."""
        for node in NODES:
            self._end_process(node, "frozen")
        for node in NODES:
            self._start_process(node)
        for stream in NODES:
            for by in NODES:  # also the entries of a stream that another node had claimed
                self._take_up(stream, by)
            self._take(stream, stream, NODE_CAP)
        while self._jobs:
            self._step(self._jobs[0], DONE)
        assert not any(self._unfinished.values())
        self.every_accepted_message_has_its_end_or_a_request()
        replies = self._entries()
        while self._frozen:  # their late steps change nothing
            self._step(self._frozen[0], DONE)
        assert self._entries() == replies
        self.redis_shows_the_requests_that_are_unfinished()
        self.every_reply_is_sound()


@pytest.mark.timeout(600)  # it takes seconds, but shrinking a failure takes longer
def test_any_order_of_work_and_death_loses_and_repeats_nothing(redis_server: RedisServer) -> None:
    known = Settings.load(redis_url=redis_server.url)
    with asyncio.Runner() as runner, redis_server.client() as client:
        connections = AsyncExitStack()

        async def connect() -> Site:
            redis_client = RedisClient(known.redis_url, connections=1, timeout=known.redis_timeout)
            reader = BlockingReader(known.redis_url, block=known.read_block, timeout=known.redis_timeout)
            connections.push_async_callback(reader.aclose)
            return Site(runner, await connections.enter_async_context(redis_client), reader, client)

        site = runner.run(connect())
        try:
            run_state_machine_as_test(
                # Any callable will do, whatever its type says.
                lambda: StoreUsed(site),  # type: ignore[arg-type]
                settings=settings(max_examples=examples_on(redis_server, 50), stateful_step_count=40),
            )
        finally:
            runner.run(connections.aclose())
