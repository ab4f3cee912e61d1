"""Compares this checkout's node with that of another release, in alternating runs: the cost of a change."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from ops.benchmark.processes import Stage
from ops.benchmark.runs import Run, alternate

NOW, BEFORE = "imstream", "other"

LOADS = (("single", 1), ("burst", 1), ("burst", 100), ("paced", 20), ("paced", 100), ("paced", 400))
ROUNDS, SECONDS = 9, 1.5

LIMIT = 1.05
"""Maximum ratio of this node's CPU to that of the other one."""


def compare(stage: Stage, python: str) -> list[list[Run]]:
    """Runs of both nodes, one list for each round. `python` is an interpreter with the other release installed."""
    stage.start_node(NOW)
    stage.start_node(BEFORE, python=python)
    return [
        runs
        for load, sockets in LOADS
        for runs in alternate(stage, (NOW, BEFORE), load, sockets, SECONDS, rounds=ROUNDS)
    ]


def table(rounds: Sequence[Sequence[Run]]) -> str:
    """One line for each load: ratios are medians over the rounds, each taken within its round."""
    lines = ["load sockets   CPU × other (rounds from, to)   Redis CPU   first ms p50, other's   late ms p99, other's"]
    for load, sockets in LOADS:
        now, before = _runs(rounds, load, sockets, NOW), _runs(rounds, load, sockets, BEFORE)
        ratios = [one.cost / other.cost for one, other in zip(now, before, strict=True)]
        redis = [one.redis_cpu / other.redis_cpu for one, other in zip(now, before, strict=True) if other.redis_cpu]
        first = "to_backend" if load == "single" else "first"
        lines.append(
            f"{load:<6} {sockets:>5}   {median(ratios):>11.3f}  ({min(ratios):.2f}, {max(ratios):.2f})   "
            f"{median(redis) if redis else 0:>15.2f}   {_ms(now, first, 'p50'):>9}, {_ms(before, first, 'p50'):<9}   "
            f"{_ms(now, 'late', 'p99'):>9}, {_ms(before, 'late', 'p99')}"
        )
    foreign = median(run.foreign for runs in rounds for run in runs)
    return "\n".join([*lines, f"CPUs used by other processes: {foreign:.2f} (median of the runs)"])


def bars(rounds: Sequence[Sequence[Run]]) -> list[tuple[bool, str]]:
    """Whether each load stays within the limit, and a sentence for it."""
    found = []
    for load, sockets in LOADS:
        pairs = zip(_runs(rounds, load, sockets, NOW), _runs(rounds, load, sockets, BEFORE), strict=True)
        ratio = median(one.cost / other.cost for one, other in pairs)
        text = f"{load}, {sockets} sockets: {ratio:.3f} of the other release's CPU, at most {LIMIT}"
        found.append((ratio <= LIMIT, text))
    return found


def as_json(rounds: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """All measurements, for programs."""
    return {"releases": [[asdict(run) for run in runs] for runs in rounds]}


def _runs(rounds: Sequence[Sequence[Run]], load: str, sockets: int, service: str) -> list[Run]:
    return [run for runs in rounds for run in runs if (run.load, run.sockets, run.service) == (load, sockets, service)]


def _ms(runs: Sequence[Run], what: str, quantile: str) -> str:
    known = [run.seen[what][quantile] for run in runs if run.seen[what]]
    return f"{median(known) * 1000:.1f}" if known else "-"
