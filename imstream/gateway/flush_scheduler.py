"""When sockets are written: in the next turn of the event loop, or in rounds, when writing takes much of the time.

A round shares the turn of the event loop, and the text that a reply gets meanwhile shares a frame.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

CPU_SHARE = 1 / 4
"""Share of the time for writing sockets, above which the node counts as busy. One user who is answered without a pause
takes a seventh."""

INTERVAL = 0.008
"""Seconds between two rounds of a busy node. A node counts as busy when writing has taken its share for that long."""

MAX_DEBT = 2 * INTERVAL
"""Maximum seconds after a burst, or a stall of the process, for which a node counts as busy."""


@dataclass(kw_only=True, repr=False)
class FlushScheduler:
    """Calls scheduled flushes in the next turn of the event loop, or when the next round is due.

    A round whose writing took `cost` seconds uses up the budget of the next `cost / CPU_SHARE` seconds.
    """

    clock: Callable[[], float] = time.perf_counter
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _next: list[Callable[[], None]] = field(default_factory=list)
    _later: list[Callable[[], None]] = field(default_factory=list)
    _paid_at: float = 0.0
    """Loop time at which the rounds so far will be paid for."""
    _due: float = 0.0
    """Loop time of the next round of a busy node."""
    _timer: asyncio.TimerHandle | None = None
    """Calls that round."""

    def schedule(self, flush: Callable[[], None], *, urgent: bool = False) -> None:
        """Call `flush` once: in the next turn if it is urgent or the node is not busy, else in the next round.

        It must not raise.
        """
        if self._next:
            self._next.append(flush)
        elif urgent or self._loop.time() >= self._due:
            self._next.append(flush)
            self._loop.call_soon(self._run)
        else:
            if self._timer is None:
                self._timer = self._loop.call_at(self._due, self.flush)
            self._later.append(flush)

    def flush(self) -> None:
        """Call everything that is scheduled, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next += self._later
        self._later.clear()
        self._run()

    def _run(self) -> None:
        now, cost = self._loop.time(), -self.clock()
        flushes, self._next = self._next, []
        if not flushes:  # `flush` has called them
            return
        for flush in flushes:
            flush()
        cost += self.clock()
        self._paid_at = min(max(self._paid_at, now) + cost / CPU_SHARE, now + MAX_DEBT)
        if self._paid_at > now + INTERVAL:
            self._due = now + INTERVAL
