"""The quota under any order of messages, repetitions, refusals, crashes and failures, on every server: exactly the
messages that were admitted and have not failed are counted, and never more than the quota."""  # noqa: D205, D209 - one thought

# ruff: noqa: D102 - the rules of the state machine have sentences for names

import asyncio
import secrets
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from imstream.clock import Day
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.accounts import AccountOpen, Accounts, QuotaExhausted
from imstream.store.replies import ReplyStore
from tests.redis.conftest import examples_on
from tests.support.servers import RedisServer

QUOTA = 3
REPLY_TTL = 900_000
DAY = Day("2099-11-24", 4_000_000_000_000, 4_086_400_000_000)
MESSAGES = st.sampled_from(["a", "b", "c", "d", "e"])


@dataclass
class Message:
    """The expected state of one message id.

    Attributes:
        counted: It is counted.
        at: When it was counted, or another request relied on that.
        live: Its reply exists, so it was admitted.
        failed: Its reply has ended as failed.
        excused: A node died, or two requests raced: it may be counted although neither was admitted.
    """

    counted: bool = False
    at: int = 0
    live: bool = False
    failed: bool = False
    excused: bool = False


@dataclass
class Passing:
    """A request that has passed the guard and is about to be admitted."""

    message_id: str
    at: int
    new: bool


class QuotaKept(RuleBasedStateMachine):
    """One user with sockets on several nodes, and every fate of a message."""

    def __init__(self, runner: asyncio.Runner, accounts: Accounts, replies: ReplyStore, client: redis.Redis) -> None:
        super().__init__()
        self._runner = runner
        self._accounts = accounts
        self._replies = replies
        self._client = client
        self._user = 10001 + secrets.randbelow(2**40)
        self._now = DAY.start
        self._messages: dict[str, Message] = {}
        self._forgotten = 0
        """Number of counted messages whose reply has expired."""
        self._passing: list[Passing] = []

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 - what the step returns
        return self._runner.run(step)

    def used(self) -> int:
        return self._forgotten + sum(message.counted for message in self._messages.values())

    @rule(message_id=MESSAGES, later=st.integers(0, 1))
    def it_is_asked(self, message_id: str, later: int) -> None:
        self._now += later
        message, used = self._messages.setdefault(message_id, Message()), self.used()
        verdict = self.run(self._accounts.check_and_count(self._user, message_id, self._now, DAY))
        if message.live:
            assert verdict == AccountOpen(used, new=False)
        elif message.counted and self._now - message.at < REPLY_TTL:
            assert verdict == AccountOpen(used, new=False)
            message.at = max(self._now, message.at + 1)
            message.excused = True
        elif used == QUOTA:
            assert verdict == QuotaExhausted()
            return
        else:
            assert verdict == AccountOpen(used + 1, new=True)
            self._forgotten += message.counted
            message.counted, message.at, message.excused = True, self._now, False
        self._passing.append(Passing(message_id, self._now, new=verdict.new))

    @precondition(lambda self: self._passing)
    @rule(data=st.data())
    def it_is_admitted(self, data: st.DataObject) -> None:
        one = self._next(data)
        self.run(self._replies.mark_queued(self._user, one.message_id))
        self._messages[one.message_id].live = True

    @precondition(lambda self: self._passing)
    @rule(data=st.data())
    def it_does_not_fit(self, data: st.DataObject) -> None:
        one = self._next(data)
        if one.new:
            self.run(self._accounts.undo_count(self._user, one.message_id, one.at, DAY))
            message = self._messages[one.message_id]
            message.counted = message.counted and message.at != one.at

    @precondition(lambda self: self._passing)
    @rule(data=st.data())
    def its_node_dies(self, data: st.DataObject) -> None:
        self._messages[self._next(data).message_id].excused = True

    @precondition(lambda self: any(message.live for message in self._messages.values()))
    @rule(data=st.data())
    def it_fails_and_that_is_told_twice(self, data: st.DataObject) -> None:
        message_id = data.draw(st.sampled_from([name for name, message in self._messages.items() if message.live]))
        message = self._messages[message_id]
        assert self.run(self._accounts.refund(self._user, message_id, DAY)) == message.counted
        assert not self.run(self._accounts.refund(self._user, message_id, DAY))
        message.counted, message.failed = False, True

    @precondition(lambda self: not self._passing)
    @rule()
    def all_replies_are_forgotten(self) -> None:
        self._now += REPLY_TTL
        for message_id, message in self._messages.items():
            self._client.delete(Keys().reply(self._user, message_id))
            message.excused = message.excused or message.live
            message.live = message.failed = False

    def _next(self, data: st.DataObject) -> Passing:
        return self._passing.pop(data.draw(st.integers(0, len(self._passing) - 1)))

    @invariant()
    def what_was_admitted_and_has_not_failed_is_counted_and_nothing_else(self) -> None:
        assert self.run(self._accounts.check(self._user, DAY)).used == self.used() <= QUOTA
        on_their_way = {one.message_id for one in self._passing}
        for message_id, message in self._messages.items():
            if message.live:
                assert message.counted != message.failed
            elif message_id not in on_their_way:
                assert not message.counted or message.excused


@pytest.mark.timeout(600)  # it takes seconds, but shrinking a failure takes longer
def test_the_quota_is_kept_in_any_order_of_events(redis_server: RedisServer) -> None:
    known = Settings.load(redis_url=redis_server.url, daily_quota=QUOTA, reply_ttl=REPLY_TTL / 1000)
    with asyncio.Runner() as runner, redis_server.client() as client:
        connections = AsyncExitStack()

        async def connect() -> RedisClient:
            redis_client = RedisClient(known.redis_url, connections=1, timeout=known.redis_timeout)
            return await connections.enter_async_context(redis_client)

        redis_client = runner.run(connect())
        accounts, replies = Accounts(redis_client, known), ReplyStore(redis_client, known)
        try:
            run_state_machine_as_test(
                # Any callable will do, whatever its type says.
                lambda: QuotaKept(runner, accounts, replies, client),  # type: ignore[arg-type]
                settings=settings(max_examples=examples_on(redis_server, 100), stateful_step_count=30),
            )
        finally:
            runner.run(connections.aclose())
