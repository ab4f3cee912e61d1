"""Notices when the event loop stood still: the process was frozen, or starved of CPU."""

from __future__ import annotations

import asyncio

import structlog

TICK = 0.5
"""Seconds between two looks."""

AFTERMATH = 1.0
"""Seconds after it went on in which whatever ran into its time limit is a consequence of it."""

log = structlog.get_logger()


class StallWatch:
    """Measures how late a timer is. `run` until cancelled.

    Time limits of commands and leases go on while the loop stands still, so that Redis seems to be lost when it was
    this process that did not listen.
    """

    def __init__(self, limit: float) -> None:
        """From `limit` seconds on, the loop counts as having stood still."""
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._due = float("inf")
        self._over = float("-inf")

    def stalled_recently(self) -> bool:
        """Whether the loop has stood still until a moment ago."""
        now = self._loop.time()
        return now - self._due > self._limit or now - self._over < AFTERMATH

    async def run(self) -> None:
        """Look every `TICK`."""
        while True:
            self._due = self._loop.time() + TICK
            await asyncio.sleep(TICK)
            late = self._loop.time() - self._due
            if late > self._limit:
                self._over = self._loop.time()
                log.warning("event loop stood still: the process was frozen or had no CPU", seconds=round(late, 1))
