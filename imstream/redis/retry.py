"""Asking Redis again until it answers: for steps that must happen and may be repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from imstream.errors import StoreFull, StoreUnavailable

Answer = TypeVar("Answer")

_PASSING = (StoreUnavailable, StoreFull)

_WAIT = wait_random_exponential(multiplier=0.1, max=1)
"""Short: Redis is back within seconds or not at all, and the node has promised to be back 2 s after it."""


async def retry_until_available(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Call until Redis answers, waiting a little longer each time. Cancel it to give up."""

    async def again() -> Answer:
        # tenacity awaits coroutine functions only: what a lambda returns it would take for the answer.
        return await call()

    try:
        return await call()
    except _PASSING:
        return await AsyncRetrying(retry=retry_if_exception_type(_PASSING), wait=_WAIT)(again)
