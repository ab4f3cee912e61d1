"""What goes wrong, and when: drawn from the seed alone, before anything has started. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """A kind of fault."""

    NODE_KILL = "node killed"
    """SIGKILL; started again."""
    NODE_FREEZE = "node frozen"
    """SIGSTOP, often past its lease, and SIGCONT: a zombie that does not know how late it is."""
    NODE_RESTART = "node restarted"
    """SIGTERM; started again when it has ended."""
    REDIS_KILL = "Redis killed"
    """SIGKILL; started again on the same data and port."""
    REDIS_FREEZE = "Redis frozen"
    """SIGSTOP and SIGCONT: the outcome of what was under way is unknown."""
    AI_KILL = "AI killed"
    """SIGKILL; started again."""
    BALANCER_RESTART = "balancer restarted"
    """Every socket breaks at once."""
    CLIENT_DROP = "client dropped"
    """The connection of one client breaks, without a word to either side."""


NODE_KINDS = (Kind.NODE_KILL, Kind.NODE_FREEZE, Kind.NODE_RESTART)

FIRST = 1.0
"""Seconds before the first fault."""

REST = 1.5
"""Seconds that a part is let alone after it was brought back: what never serves is not tested."""


@dataclass(frozen=True, slots=True)
class Habit:
    """How one kind of fault comes. Times in seconds.

    Attributes:
        every: From one to the next, on average.
        shortest: Shortest outage.
        longest: Longest outage.
    """

    every: float
    shortest: float
    longest: float


LEASE = 3.0
"""The lease of every node, in seconds: outages of nodes are shorter as often as longer."""

HABITS = {
    Kind.NODE_KILL: Habit(10, 0, 2 * LEASE),
    Kind.NODE_FREEZE: Habit(16, LEASE / 6, 3 * LEASE),
    Kind.NODE_RESTART: Habit(14, 0, 1.5 * LEASE),
    Kind.REDIS_KILL: Habit(25, 0, 3),
    Kind.REDIS_FREEZE: Habit(40, 0.2, 3),
    Kind.AI_KILL: Habit(20, 0, 4),
    Kind.BALANCER_RESTART: Habit(30, 0, 1.5),
    Kind.CLIENT_DROP: Habit(1.5, 0, 0),
}
"""None is longer than clients are patient, and several are never all: Redis is away for a tenth of the time at most."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at: When, in seconds since the start.
        kind: What.
        target: Which node or client, from 0; 0 where there is only one.
        outage: Seconds until it is brought back. A node that is restarted is started that long after it has ended.
    """

    at: float
    kind: Kind
    target: int
    outage: float


def draw(seed: int, seconds: float, *, nodes: int, clients: int) -> list[Fault]:
    """The faults of a run, in order. No part is struck again before it was brought back and had its rest."""
    faults = [fault for kind in Kind for fault in _draw_kind(seed, kind, seconds, nodes=nodes, clients=clients)]
    free_at: dict[tuple[str, int], float] = {}
    drawn = []
    for fault in sorted(faults, key=lambda fault: fault.at):
        part = (fault.kind.split()[0], fault.target)
        if fault.kind is Kind.CLIENT_DROP or free_at.get(part, 0) <= fault.at:
            free_at[part] = fault.at + fault.outage + REST
            drawn.append(fault)
    return drawn


def _draw_kind(seed: int, kind: Kind, seconds: float, *, nodes: int, clients: int) -> list[Fault]:
    # Each kind has a sequence of its own: another number of nodes leaves what happens to Redis as it was.
    chance = random.Random(f"{seed} {kind}")  # noqa: S311 - draws faults, no secrets
    habit, faults = HABITS[kind], []
    at = FIRST + chance.uniform(0, habit.every)
    while at < seconds:
        place, outage = chance.random(), chance.uniform(habit.shortest, habit.longest)
        candidates = nodes if kind in NODE_KINDS else clients if kind is Kind.CLIENT_DROP else 1
        faults.append(Fault(at, kind, int(place * candidates), outage))
        at += chance.uniform(0.2, 1.8) * habit.every
    return faults
