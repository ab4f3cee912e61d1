"""When sockets are written: in rounds, so that what costs a little each time is paid for many at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

APART = 0.008
"""Least seconds between two rounds. Nobody reads so fast that he could tell; with 100 paced answers, 15 deltas share a
round, and a node needs 5 % less CPU than with a turn of the event loop for each."""


class Rounds:
    """Calls whoever has joined: in the next turn of the event loop when the last round is long enough ago."""

    def __init__(self, *, apart: float = APART) -> None:
        self._loop = asyncio.get_running_loop()
        self._apart = apart
        self._joined: list[Callable[[], None]] = []
        self._next = 0.0

    def join(self, call: Callable[[], None]) -> None:
        """Have `call` called in the next round. It must not raise."""
        if not self._joined:
            if self._loop.time() >= self._next:
                self._loop.call_soon(self._go)
            else:
                self._loop.call_at(self._next, self._go)
        self._joined.append(call)

    def _go(self) -> None:
        self._next = self._loop.time() + self._apart
        joined, self._joined = self._joined, []
        for call in joined:
            call()
