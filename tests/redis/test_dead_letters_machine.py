"""Dead letters that are retried, at any time and any number of times, while workers and the operator die anywhere.

Each admission, also that of a retried letter, has exactly one terminal event; nothing is lost, and no message that was
answered is answered again.
"""

# ruff: noqa: D102 - the rules of the state machine have sentences for names

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from imstream.errors import StoreUnavailable
from imstream.keys import Keys
from imstream.model import ChatRequest, Terminal
from imstream.redis.client import BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.dead_letters import DeadLetterOffice, Letter, Selection
from imstream.store.replies import Appended, Ended, Opened, ReplyStore
from imstream.store.requests import Entry, PendingEntry, RequestStream
from tests.redis.conftest import chat_request, examples_on
from tests.support.servers import RedisServer

USER = 10001
MESSAGES = ("a", "b")
CAP = 4
DONE, FAILED = Terminal("done", "stop"), Terminal("failed", reason="http_503")


@dataclass(eq=False)
class Job:
    """A worker's work on one request. `then`: the remaining steps when its end is recorded."""

    entry: Entry
    request: ChatRequest
    attempt: int = 0
    then: str = ""


@dataclass
class Site:
    """Connections to one server."""

    runner: asyncio.Runner
    redis_client: RedisClient
    reader: BlockingReader
    redis: Any


class LettersRetried(RuleBasedStateMachine):
    """One stream, two messages, any number of workers and operators."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._run = site.runner.run
        self._redis = site.redis
        self._redis.flushall()
        known = Settings.load(node="0", queue_limit=CAP, user_limit=CAP)
        self._keys = Keys()
        self._requests = RequestStream(site.redis_client, site.reader, known)
        self._replies = ReplyStore(site.redis_client, known)
        self._office = DeadLetterOffice(site.redis_client, known)
        self._run(self._requests.ensure_group())
        self._jobs: list[Job] = []
        self._zombies: list[Job] = []
        self._seen: list[Letter] = []
        """All letters that an operator has ever listed."""
        self._admitted = Counter[str]()
        """Admissions of each message, those of retried letters included."""
        self._answered = Counter[str]()

    @rule(message=st.sampled_from(MESSAGES))
    def a_user_asks(self, message: str) -> None:
        """Perhaps again, with the same id."""
        before = self._redis.xlen(self._keys.requests("0"))
        self._run(self._requests.admit(chat_request(USER, message, message)))
        self._admitted[message] += self._redis.xlen(self._keys.requests("0")) - before

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def a_worker_takes_a_request(self, data: st.DataObject) -> None:
        self._take(data.draw(st.sampled_from(self._idle()), label="entry"))

    def _idle(self) -> list[str]:
        """Entries that no living worker has."""
        taken = {job.entry.entry_id for job in self._jobs}
        return [entry_id for entry_id, _ in self._redis.xrange(self._keys.requests("0")) if entry_id not in taken]

    def _take(self, entry_id: str) -> None:
        self._run(self._requests.read(count=CAP, block=None))  # delivers all; those without a worker are claimed
        entry = self._run(self._requests.claim(PendingEntry(entry_id, 1, "0"), deliveries=1))
        assert entry is not None
        self._jobs.append(Job(entry, ChatRequest.from_fields(entry.fields, entry_id)))

    @precondition(lambda self: self._jobs or self._zombies)
    @rule(data=st.data(), fails=st.booleans(), steps=st.integers(1, 4), dies=st.booleans())
    def a_worker_goes_on(self, data: st.DataObject, *, fails: bool, steps: int, dies: bool) -> None:
        """Open, append the end, finish or bury; it may die between any two, or be frozen and continue later."""
        job = data.draw(st.sampled_from(self._jobs + self._zombies), label="job")
        for _ in range(steps):
            if job in self._jobs or job in self._zombies:
                self._step(job, FAILED if fails else DONE)
        if dies and job in self._jobs:
            self._jobs.remove(job)
            self._zombies.append(job)

    def _step(self, job: Job, terminal: Terminal) -> None:
        message = job.request.message_id
        if job.then:
            self._leave(job)
        elif job.attempt == 0:
            verdict = self._run(
                self._replies.open(
                    USER,
                    message,
                    job.request.question,
                    request=f"0/{job.entry.entry_id}",
                    after=job.request.earlier_attempts,
                    reopens=job.request.reopens is not None,
                )
            )
            match verdict:
                case Opened(attempt):
                    assert attempt > job.request.earlier_attempts
                    job.attempt = attempt
                case Ended("failed", owner) if owner == f"0/{job.entry.entry_id}":
                    job.then = "bury"
                case _:
                    job.then = "finish"
        else:
            given: dict[str, Any] = {"attempt": job.attempt, "before": 0, "after": 1, "text": "x", "terminal": terminal}
            before = len(self._terminals(message))
            appended = self._run(self._replies.append(USER, message, **given))
            if isinstance(appended, Appended):
                self._answered[message] += terminal is DONE and len(self._terminals(message)) > before
                job.then = "bury" if terminal is FAILED else "finish"
            else:
                job.then = "leave"

    def _leave(self, job: Job) -> None:
        if job.then == "bury":
            self._run(self._requests.bury(job.entry, reason="x", error="y", attempts=job.attempt or 1))
        elif job.then == "finish":
            self._run(self._requests.finish(job.entry))
        (self._jobs if job in self._jobs else self._zombies).remove(job)

    # Operators

    @rule(data=st.data(), dies_after=st.integers(0, 4))
    def an_operator_retries(self, data: st.DataObject, dies_after: int) -> None:
        """A letter that is there, or was once: from a list that is old by now. The command may die at any command."""
        self._seen += [one for one in self._letters() if one not in self._seen]
        if not self._seen:
            return
        letter = data.draw(st.sampled_from(self._seen), label="letter")
        is_there, unfinished = letter in self._letters(), self._redis.xlen(self._keys.requests("0"))
        verdict = self._run(self._interrupted(lambda: self._office.retry(letter), dies_after))
        moved = self._redis.xlen(self._keys.requests("0")) - unfinished
        assert verdict in {None, "retried" if is_there and unfinished < CAP else "node_full" if is_there else "unknown"}
        assert moved == 0 or (is_there and unfinished < CAP)
        assert verdict != "retried" or moved == 1
        assert (letter in self._letters()) == (is_there and not moved)
        self._admitted[letter.fields["message_id"]] += moved

    async def _interrupted(self, call: Callable[[], Awaitable[Any]], commands: int) -> Any:  # noqa: ANN401 - its result
        """The result of a call, or None when its process died after that many commands."""
        client, left = self._office._redis, iter(range(commands))  # noqa: SLF001 - where its commands leave
        execute = client.execute

        async def counted(*command: Any, urgent: bool = True) -> Any:  # noqa: ANN401 - as `execute`
            if next(left, None) is None:
                raise StoreUnavailable("died")
            return await execute(*command, urgent=urgent)

        client.execute = counted  # type: ignore[method-assign] # a process that dies
        try:
            return await call()
        except StoreUnavailable:
            return None
        finally:
            client.execute = execute  # type: ignore[method-assign] # as above

    def _letters(self) -> list[Letter]:
        async def listed() -> list[Letter]:
            return [letter async for letter in self._office.letters("0", Selection(since=timedelta(days=1)))]

        return self._run(listed())

    @precondition(lambda self: self._letters())
    @rule(data=st.data())
    def the_reply_of_a_letter_expires(self, data: st.DataObject) -> None:
        letter = data.draw(st.sampled_from(self._letters()), label="letter")
        message = letter.fields["message_id"]
        if not self._answered[message]:
            self._redis.delete(self._keys.reply(USER, message))

    # Invariants

    def _events(self, message: str) -> list[str]:
        return [fields["event"] for _, fields in self._redis.xrange(self._keys.reply(USER, message))]

    def _terminals(self, message: str) -> list[str]:
        return [event for event in self._events(message) if event in {"done", "failed"}]

    @invariant()
    def a_reply_goes_on_only_after_failed_and_with_reopened(self) -> None:
        for message in MESSAGES:
            events = self._events(message)
            for event, following in pairwise(events):
                assert event != "done"
                assert (event == "failed") == (following == "reopened")
            assert events.count("done") <= 1
            assert events.count("reopened") < max(1, self._admitted[message])

    @invariant()
    def requests_are_counted(self) -> None:
        unfinished = self._redis.xlen(self._keys.requests("0"))
        assert unfinished <= CAP
        assert self._redis.hgetall(self._keys.load("0")) == ({str(USER): str(unfinished)} if unfinished else {})

    @invariant()
    def no_message_is_lost_or_answered_twice(self) -> None:
        kept = {fields["message_id"] for _, fields in self._redis.xrange(self._keys.requests("0"))}
        kept |= {letter.fields["message_id"] for letter in self._letters()}
        for message in MESSAGES:
            assert self._answered[message] <= 1
            if self._admitted[message] and message not in kept:
                assert self._events(message)[-1] == "done"

    def teardown(self) -> None:
        """Whatever happened: at last all letters are retried, and every message is answered once."""
        self._zombies += self._jobs
        self._jobs.clear()
        for _ in range(20):
            for letter in self._letters():
                if self._run(self._office.retry(letter)) == "retried":
                    self._admitted[letter.fields["message_id"]] += 1
            for entry_id in self._idle():
                self._take(entry_id)
            while self._jobs:
                self._step(self._jobs[0], DONE)
        while self._zombies:
            self._step(self._zombies[0], FAILED)
        assert not self._letters()
        assert not self._redis.xlen(self._keys.requests("0"))
        for message in MESSAGES:
            assert self._answered[message] == (1 if self._admitted[message] else 0)
        self.a_reply_goes_on_only_after_failed_and_with_reopened()


@pytest.mark.timeout(600)  # it takes seconds, but shrinking a failure takes longer
def test_letters_that_are_retried_in_any_order_are_never_lost_and_never_answered_twice(
    redis_server: RedisServer,
) -> None:
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
                lambda: LettersRetried(site),  # type: ignore[arg-type] # any callable will do
                settings=settings(max_examples=examples_on(redis_server, 27), stateful_step_count=30),
            )
        finally:
            runner.run(connections.aclose())
