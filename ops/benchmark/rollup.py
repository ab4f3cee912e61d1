"""Compares nodes with different limits of the roll-up (`IMSTREAM_ROLLUP`) under paced answers, in alternating runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from ops.benchmark.processes import Stage
from ops.benchmark.runs import Run, alternate

ROLLUPS = {"off": "0", "short": "25ms", "default": "40ms"}
"""The setting of each node."""

SOCKETS = (20, 100, 400)
ROUNDS, SECONDS = 7, 1.5


def compare(stage: Stage) -> list[list[Run]]:
    """Runs of all nodes, one list for each round."""
    for name, limit in ROLLUPS.items():
        stage.start_node(name, rollup=limit)
    return [
        runs
        for sockets in SOCKETS
        for runs in alternate(stage, list(ROLLUPS), "paced", sockets, SECONDS, rounds=ROUNDS)
    ]


def summary(rounds: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """The medians over the rounds, for each number of sockets and limit; `times_off` is taken within each round."""
    return [
        _record([runs for runs in rounds if runs[0].sockets == sockets], sockets, name)
        for sockets in SOCKETS
        for name in ROLLUPS
    ]


def _record(rounds: Sequence[Sequence[Run]], sockets: int, name: str) -> dict[str, Any]:
    by_name = [{run.service: run for run in runs} for runs in rounds]
    own = [runs[name] for runs in by_name]

    def mid(value: Callable[[Run], float]) -> float:
        return median(map(value, own))

    return {
        "sockets": sockets,
        "rollup": ROLLUPS[name],
        "times_off": median(runs[name].cost / runs["off"].cost for runs in by_name),
        "cpu_s_per_1000_chats": mid(lambda run: run.cost),
        "frames_per_chat": mid(lambda run: run.seen["frames"] / run.seen["chats"]),
        "first_ms_p50": mid(lambda run: run.seen["first"]["p50"] * 1000),
        "late_ms_p50": mid(lambda run: run.seen["late"]["p50"] * 1000),
        "late_ms_p99": mid(lambda run: run.seen["late"]["p99"] * 1000),
    }


def table(rounds: Sequence[Sequence[Run]]) -> str:
    """One line for each number of sockets and limit."""
    lines = ["sockets rollup  CPU s/1000   ×off  frames  first ms p50  late ms p50/p99"]
    lines += [
        f"{it['sockets']:>7} {it['rollup']:>6} {it['cpu_s_per_1000_chats']:>11.2f} {it['times_off']:>6.2f} "
        f"{it['frames_per_chat']:>7.1f} {it['first_ms_p50']:>13.1f} {it['late_ms_p50']:>11.1f}/{it['late_ms_p99']:.1f}"
        for it in summary(rounds)
    ]
    foreign = median(run.foreign for runs in rounds for run in runs)
    return "\n".join([*lines, f"CPUs used by other processes: {foreign:.2f} (median of the runs)"])


def as_json(rounds: Sequence[Sequence[Run]], about: dict[str, Any]) -> dict[str, Any]:
    """All measurements, for programs."""
    return {
        "circumstances": about,
        "rollup": summary(rounds),
        "rollup_runs": [[asdict(run) for run in runs] for runs in rounds],
    }
