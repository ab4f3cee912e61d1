"""Retrying until Redis is available."""

import asyncio

import pytest

from imstream.errors import StoreFull, StoreRefused, StoreUnavailable
from imstream.redis.errors import retry_until_available
from tests.support.virtual_time import in_virtual_time


class Redis:
    """Raises the given errors one after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.at: list[float] = []

    async def ask(self) -> str:
        """One command."""
        self.at.append(asyncio.get_running_loop().time())
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@in_virtual_time
async def test_an_answer_at_once_is_given_at_once() -> None:
    redis = Redis()
    assert await retry_until_available(redis.ask) == "answer"
    assert redis.at == [0.0]


@in_virtual_time
async def test_it_asks_until_redis_is_back_or_has_memory_again() -> None:
    redis = Redis(StoreUnavailable("away"), StoreFull("OOM"), StoreUnavailable("away"))
    assert await retry_until_available(redis.ask) == "answer"
    assert len(redis.at) == 4


@in_virtual_time
async def test_however_long_redis_was_away_it_is_asked_again_within_a_second() -> None:
    redis = Redis(*(StoreUnavailable("away") for _ in range(500)))
    await retry_until_available(redis.ask)
    waits = [later - earlier for earlier, later in zip(redis.at, redis.at[1:], strict=False)]
    assert max(waits) <= 1
    assert len(set(waits[10:])) > 100  # waiting clients must not retry all at once


@in_virtual_time
async def test_what_redis_refuses_is_not_asked_again() -> None:
    for errors in ([StoreRefused("WRONGTYPE")], [StoreUnavailable("away"), StoreRefused("WRONGTYPE")]):
        redis = Redis(*errors)
        with pytest.raises(StoreRefused):
            await retry_until_available(redis.ask)
        assert len(redis.at) == len(errors)


@in_virtual_time
async def test_who_waits_may_give_up() -> None:
    redis = Redis(*(StoreUnavailable("away") for _ in range(500)))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await retry_until_available(redis.ask)
    assert redis.at[-1] < 5
