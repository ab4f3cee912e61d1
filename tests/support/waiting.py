"""Wait for a condition with a time limit."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

SLOW = 3
"""How many times slower a machine may be than the reference for the time limits."""


async def wait_until(
    condition: Callable[[], object] | Callable[[], Awaitable[object]], description: str, *, limit: float = 10.0
) -> None:
    """Poll until the condition holds, every 10 ms. Fails after `limit` seconds of the reference machine."""
    deadline = time.monotonic() + limit * SLOW
    while True:
        holds = condition()
        if inspect.isawaitable(holds):
            holds = await holds
        if holds:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit * SLOW} s: {description}")
        await asyncio.sleep(0.01)
