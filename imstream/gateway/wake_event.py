"""An event for one waiter. Each idle socket holds a few, and asyncio's takes 760 bytes."""

from __future__ import annotations

import asyncio


class WakeEvent:
    """Wakes the one who waits; when nobody does, the next one that comes. It is silent again after each wake."""

    __slots__ = ("_loop", "_rung", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the waiter."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until it rings, or return at once when it has since the last wait."""
        if not self._rung:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False
