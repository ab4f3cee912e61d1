"""When sockets are written: at once while little is said, else in rounds, so that many share what each round costs.

The dearer the rounds, the further apart they are: a node short of time sends fewer and longer deltas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

APART = 0.008
"""Least seconds between two rounds of a busy node. Nobody reads so fast that he could tell; with 100 paced answers, 40
deltas share a round, and a node needs 5 to 10 % less CPU than with a turn of the event loop for each."""

AT_ONCE = 4
"""Most rounds within that time that are held at once. One that would be the next waits, and the node is busy."""

SHARE = 1 / 6
"""Share of a busy node's time that rounds take, until they are `MOST_APART`: then the text of an answer that comes
meanwhile shares a frame. Writing a frame is the dearest step of a delta."""

MOST_APART = 0.025
"""Most seconds between two rounds: shorter than from one picture of a film to the next."""


class FlushScheduler:
    """Calls whoever has joined: in the next turn of the event loop, or when the next round is due."""

    def __init__(
        self,
        *,
        apart: float = APART,
        most_apart: float = MOST_APART,
        at_once: int = AT_ONCE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._apart = apart
        self._most_apart = most_apart
        self._clock = clock
        self._at_once = at_once
        self._joined: list[Callable[[], None]] = []
        self._next = 0.0
        self._left = 0

    def join(self, call: Callable[[], None]) -> None:
        """Have `call` called in the next round. It must not raise."""
        if not self._joined:
            now = self._loop.time()
            if now >= self._next:  # it was quiet
                self._next, self._left = now + self._apart, self._at_once
            if self._left > 0:
                self._left -= 1
                self._loop.call_soon(self._go)
            else:
                self._loop.call_at(self._next, self._go_together)
        self._joined.append(call)

    def _go_together(self) -> None:
        began = self._loop.time()
        self._next = began + self._apart  # whoever joins now waits for it
        cost = -self._clock()
        self._go()
        cost += self._clock()
        if not self._joined:
            self._next = began + max(self._apart, min(cost / SHARE, self._most_apart))

    def _go(self) -> None:
        joined, self._joined = self._joined, []
        for call in joined:
            call()
