"""Commands that ask Redis something: over one connection, and with errors that say which Redis it was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from imstream.errors import StoreDenied, StoreUnavailable
from imstream.redis.client import RedisClient
from imstream.settings import Settings

Answer = TypeVar("Answer")


def ask(settings: Settings, work: Callable[[RedisClient], Awaitable[Answer]]) -> Answer:
    """Do this work with the Redis of the settings.

    Raises:
        StoreUnavailable: Redis was not reached, or does not let us in.
        StoreError: It did not do what it was asked.
    """

    async def connected() -> Answer:
        async with RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout) as redis:
            return await work(redis)

    address = settings.redis_url
    try:
        return asyncio.run(connected())
    except StoreDenied as error:
        raise StoreDenied(f"the Redis at {address} denies access: {error}") from None
    except StoreUnavailable as error:
        raise StoreUnavailable(f"no Redis at {address}: {error}") from None
