"""The schedule of faults, drawn from the seed alone before anything starts. Pure."""

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """A kind of fault."""

    NODE_KILL = "node killed"
    """SIGKILL; started again."""
    NODE_FREEZE = "node frozen"
    """SIGSTOP, often longer than its lease, and SIGCONT."""
    NODE_RESTART = "node restarted"
    """SIGTERM; started again when it has ended."""
    REDIS_KILL = "Redis killed"
    """SIGKILL; started again on the same data and port."""
    REDIS_FREEZE = "Redis frozen"
    """SIGSTOP and SIGCONT: the outcome of pending commands is unknown."""
    AI_KILL = "AI killed"
    """SIGKILL; started again."""
    BALANCER_RESTART = "balancer restarted"
    """All sockets break at the same time."""
    CLIENT_DROP = "client dropped"
    """The connection of one client breaks without a close frame."""


NODE_KINDS = (Kind.NODE_KILL, Kind.NODE_FREEZE, Kind.NODE_RESTART)

FIRST = 1.0
"""Seconds before the first fault."""

REST = 1.5
"""Minimum time between a restart and the next fault of a part, in seconds, so that it serves in between."""


@dataclass(frozen=True, slots=True)
class FaultRate:
    """The frequency of one kind of fault, and the bounds of its outages. Times in seconds.

    Attributes:
        every: Mean time between two faults.
    """

    every: float
    shortest: float
    longest: float


LEASE = 3.0
"""The lease of every node, in seconds: about half of the outages of nodes are longer."""

FAULT_RATES = {
    Kind.NODE_KILL: FaultRate(10, 0, 2 * LEASE),
    Kind.NODE_FREEZE: FaultRate(16, LEASE / 6, 3 * LEASE),
    Kind.NODE_RESTART: FaultRate(14, 0, 1.5 * LEASE),
    Kind.REDIS_KILL: FaultRate(25, 0, 3),
    Kind.REDIS_FREEZE: FaultRate(40, 0.2, 3),
    Kind.AI_KILL: FaultRate(20, 0, 4),
    Kind.BALANCER_RESTART: FaultRate(30, 0, 1.5),
    Kind.CLIENT_DROP: FaultRate(1.5, 0, 0),
}
"""No outage is longer than clients wait, and Redis is unavailable for at most a tenth of the time."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at: Seconds since the start.
        target: Index of the node or client; 0 where there is only one.
        outage: Seconds until it is restored. A node that is restarted is started this long after it has ended.
    """

    at: float
    kind: Kind
    target: int
    outage: float


def draw(seed: int, seconds: float, *, nodes: int, clients: int) -> list[Fault]:
    """The faults of a run, in order. No part has a fault before it is restored and has run for `REST`."""
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
    # Each kind has its own sequence: another number of nodes does not change the faults of Redis.
    rng = random.Random(f"{seed} {kind}")  # noqa: S311 - no secrets
    rate, faults = FAULT_RATES[kind], []
    at = FIRST + rng.uniform(0, rate.every)
    while at < seconds:
        place, outage = rng.random(), rng.uniform(rate.shortest, rate.longest)
        candidates = nodes if kind in NODE_KINDS else clients if kind is Kind.CLIENT_DROP else 1
        faults.append(Fault(at, kind, int(place * candidates), outage))
        at += rng.uniform(0.2, 1.8) * rate.every
    return faults
