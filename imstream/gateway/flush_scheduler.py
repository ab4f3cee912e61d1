"""When sockets are written: at once while the node is quiet, else together in rounds, which share their cost.

The more a round costs, the longer the interval to the next one: a busy node sends fewer and longer deltas.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MIN_INTERVAL = 0.008
"""Minimum seconds between two rounds of a busy node. With 100 paced answers, 40 deltas share a round, and a node needs
5 to 10 % less CPU than with a turn of the event loop for each."""

QUIET_ROUNDS = 4
"""Maximum rounds within that time that are held at once. The next one waits, and the node counts as busy."""

MAX_INTERVAL = 0.025
"""Maximum seconds between two rounds; no reader notices them."""

CPU_SHARE = 1 / 6
"""Share of a busy node's time for rounds, up to `MAX_INTERVAL`. The text that a reply gets meanwhile shares a frame: to
write a frame is the most expensive step of a delta."""


@dataclass(kw_only=True, repr=False)
class FlushScheduler:
    """Calls scheduled flushes in the next turn of the event loop, or when the next round is due."""

    min_interval: float = MIN_INTERVAL
    max_interval: float = MAX_INTERVAL
    quiet_rounds: int = QUIET_ROUNDS
    clock: Callable[[], float] = time.perf_counter
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _scheduled: list[Callable[[], None]] = field(default_factory=list)
    _next_round: float = 0.0
    _rounds_left: int = 0

    def schedule(self, flush: Callable[[], None]) -> None:
        """Call `flush` once, in the next round. It must not raise."""
        if not self._scheduled:
            now = self._loop.time()
            if now >= self._next_round:
                self._next_round, self._rounds_left = now + self.min_interval, self.quiet_rounds
            if self._rounds_left > 0:
                self._rounds_left -= 1
                self._loop.call_soon(self._run)
            else:
                self._loop.call_at(self._next_round, self._run_round)
        self._scheduled.append(flush)

    def _run_round(self) -> None:
        start = self._loop.time()
        self._next_round = start + self.min_interval  # for flushes that are scheduled within this round
        cost = -self.clock()
        self._run()
        cost += self.clock()
        if not self._scheduled:
            self._next_round = start + max(self.min_interval, min(cost / CPU_SHARE, self.max_interval))

    def _run(self) -> None:
        scheduled, self._scheduled = self._scheduled, []
        for flush in scheduled:
            flush()
