"""Waiting for a task or for something else that makes it needless."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def completes_first(task: asyncio.Task[Any], other: Coroutine[Any, Any, object], *, keep: bool = False) -> bool:
    """Whether a task ends before a coroutine. Cancels the coroutine, and a later task unless `keep`."""
    rival = asyncio.create_task(other)
    try:
        await asyncio.wait({task, rival}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        rival.cancel()
        if not task.done() and not keep:
            task.cancel()
            await asyncio.wait({task})
    return task.done() and not task.cancelled()
