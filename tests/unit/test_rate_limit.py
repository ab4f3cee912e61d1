"""The rate limit of messages."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.codes import Code
from imstream.guards.chain import GuardChain
from imstream.guards.chat_limits import ChatRateLimit
from imstream.guards.guard import ALLOW, Reject
from imstream.model import ChatRequest
from imstream.user_ids import UserId
from tests.support.guard_deps import guard_deps
from tests.support.virtual_time import in_virtual_time

ASKED = ChatRequest(10001, "m-1", "hello", (), "en", 0, "trace")


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 5_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


async def ask(limit: ChatRateLimit, user_id: UserId = 10001) -> timedelta | None:
    """Send a message; how long to wait, None when it is allowed."""
    verdict = await limit.check_chat(replace(ASKED, user_id=user_id))
    if verdict is ALLOW:
        return None
    assert isinstance(verdict, Reject)
    assert (verdict.code, verdict.close, verdict.violation) == (Code.RATE_LIMITED, None, False)
    assert verdict.retry_after is not None
    return verdict.retry_after


async def test_a_minutes_worth_passes_at_once_and_then_who_waits_as_told() -> None:
    clock = Clock()
    limit = ChatRateLimit(60, clock)
    assert [await ask(limit) for _ in range(60)] == [None] * 60
    for _ in range(3):
        wait = await ask(limit)
        assert wait is not None
        assert wait.total_seconds() == pytest.approx(1.0)
        clock.now += wait.total_seconds()
        assert await ask(limit) is None


async def test_who_does_not_wait_only_waits_and_does_not_make_it_longer() -> None:
    clock = Clock()
    limit = ChatRateLimit(6, clock)
    for _ in range(6):
        await ask(limit)
    waits = [await ask(limit) for _ in range(100)]
    assert {wait and round(wait.total_seconds(), 6) for wait in waits} == {10.0}
    clock.now += 10
    assert await ask(limit) is None


async def test_each_user_has_a_pace_of_their_own() -> None:
    limit = ChatRateLimit(2, Clock())
    assert [await ask(limit, 10001) is None for _ in range(3)] == [True, True, False]
    assert [await ask(limit, 10002) is None for _ in range(3)] == [True, True, False]


@given(st.lists(st.tuples(st.integers(10001, 10010), st.floats(0, 20)), max_size=200))
@pytest.mark.parametrize("per_minute", [1, 7, 60])
def test_in_two_minutes_nobody_asks_more_than_three_minutes_worth(
    per_minute: int, asking: list[tuple[int, float]]
) -> None:
    passed: list[tuple[int, float]] = []

    @in_virtual_time
    async def play() -> None:
        clock = Clock()
        limit = ChatRateLimit(per_minute, clock)
        for user_id, gap in asking:
            clock.now += gap
            if await ask(limit, user_id) is None:
                passed.append((user_id, clock.now))
            assert len(limit) <= 10

    play()
    for user_id, at in passed:
        span = [one for one in passed if one[0] == user_id and at <= one[1] <= at + 120]
        assert len(span) <= 3 * per_minute


async def test_a_user_who_asks_nothing_for_a_minute_is_forgotten() -> None:
    clock = Clock()
    limit = ChatRateLimit(60, clock)
    for user_id in range(10001, 11001):
        clock.now += 0.5
        await ask(limit, user_id)
        assert len(limit) <= 3  # a bucket is full a second after one message
    for _ in range(60):
        await ask(limit, 20000)
    for user_id in range(10001, 10121):
        clock.now += 0.5
        await ask(limit, user_id)
    assert len(limit) <= 121
    clock.now += 61
    await ask(limit, 10001)
    assert len(limit) == 1


def test_no_limit_is_no_guard() -> None:
    def limits(per_minute: int) -> int:
        chain = GuardChain.create(guard_deps(chats_per_minute=per_minute))
        return sum(isinstance(guard, ChatRateLimit) for guard in chain.guards)

    assert (limits(0), limits(60)) == (0, 1)
