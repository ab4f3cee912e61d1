"""Roll-up: while a node is busy, connections to backends rest after text, so that the next piece has more of it.

Reading, parsing, framing and sending are then done once for several deltas, and in one turn of the event loop for
several answers.

an answer begins              its connection gets one of `SLOTS` slots, which take turns: not all are read together
a read after the first text   the connection rests until the next turn of its slot, at most `period` later
a turn would be short         several slots share it, up to `TURN`: what its first answers bring into the caches of the
                              CPU serves the others. In turns of 25, 100 answers would take a fifth more CPU
the thread takes `QUIET` CPU  `period` is 0: no connection rests
the thread takes `BUSY` CPU   `period` is at its limit; in between it grows with the CPU
very few are                  `period` is at most `PER_ANSWER` for each: there is little to share
"""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from math import ceil
from typing import Protocol

SLOTS = 8
QUIET, BUSY = 0.03, 0.06
"""CPUs that the thread of the event loop takes. Rests lower it: with a higher limit, a node with 100 paced answers
balances at rests of about one delta, which share little."""

TURN = 0.006  # seconds of CPU of a turn, at most, because other events wait for it
COST = 20e-6  # seconds of CPU for an answer, until the first turn has been measured
PER_ANSWER = 0.002  # seconds
MIN_PERIOD = 0.016  # seconds; a shorter rest costs more than it saves
SAMPLE = 0.1  # seconds between two looks at the CPU
MEMORY = 2  # looks, and turns, that an average is about


class Sleeper(Protocol):
    """The connection of an answer. `slot`: set when it joins."""

    slot: int

    def wake(self) -> None:
        """Read again."""
        ...


class RollUp:
    """The rests of all connections of a node."""

    def __init__(self, limit: timedelta, *, cpu_clock: Callable[[], float] = time.thread_time) -> None:
        """`limit`: maximum of `period`."""
        self.on_turn: Callable[[], None] = lambda: None
        """Called after each turn."""
        self._limit = limit.total_seconds()
        self._cpu_clock = cpu_clock
        self._slots: list[set[Sleeper]] = [set() for _ in range(SLOTS)]
        self._answers = self._joined = self._at = 0
        self._share = SLOTS  # slots of the next turn
        self._due: float | None = None  # loop time of the next turn; None: no connection rests
        self._grown = self._period = self._cpu = self._sampled_at = 0.0
        self._cost = COST  # average of the last turns

    def join(self, sleeper: Sleeper) -> None:
        """An answer begins."""
        self._answers += 1
        self._joined += 1
        sleeper.slot = self._joined % SLOTS

    def leave(self, sleeper: Sleeper) -> None:
        """An answer has ended: do not wake it in a later turn."""
        self._answers -= 1
        self._slots[sleeper.slot].discard(sleeper)

    def rest(self, sleeper: Sleeper) -> bool:
        """Wake it at the next turn of its slot; False: it continues, because the node is not busy."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._sampled_at >= SAMPLE:
            self._sample(now)
        if self._period < MIN_PERIOD:
            return False
        self._slots[sleeper.slot].add(sleeper)
        if self._due is None:
            self._share = self._next_share()
            self._due = now + self._period * self._share / SLOTS
            loop.call_at(self._due, self._turn)
        return True

    def _sample(self, now: float) -> None:
        elapsed, used = now - self._sampled_at, -self._cpu
        self._sampled_at, self._cpu = now, self._cpu_clock()
        share = (used + self._cpu) / elapsed
        target = self._limit * min(max((share - QUIET) / (BUSY - QUIET), 0.0), 1.0)
        self._grown += (target - self._grown) * min(elapsed / SAMPLE / MEMORY, 1.0)
        self._period = min(self._grown, PER_ANSWER * self._answers)

    def _turn(self) -> None:
        turn: list[Sleeper] = []
        for _ in range(self._share):
            self._at = (self._at + 1) % SLOTS
            turn += self._slots[self._at]
            self._slots[self._at].clear()
        number, used = len(turn), -self._cpu_clock()
        try:
            while turn:
                turn.pop().wake()
        finally:
            for sleeper in turn:  # one has failed
                self._slots[sleeper.slot].add(sleeper)
            self.on_turn()
            if number:
                self._cost += ((used + self._cpu_clock()) / number - self._cost) / MEMORY
            self._schedule_next()

    def _schedule_next(self) -> None:
        loop, share, due = asyncio.get_running_loop(), self._share, self._due
        self._share, self._due = self._next_share(), None
        if due is not None and any(self._slots):
            # No slot waits for more than the period when the share changes. A turn that comes late delays no other.
            pause = max(self._period, MIN_PERIOD) * min(share, self._share) / SLOTS
            self._due = max(due + pause, loop.time())
            loop.call_at(self._due, self._turn)

    def _next_share(self) -> int:
        """The number of slots of a turn. It divides `SLOTS`, so that each slot comes after the same time."""
        turns = min(max(ceil(self._answers * self._cost / TURN), 1), SLOTS)
        return SLOTS // turns
