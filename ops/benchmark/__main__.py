"""`ops/bench`: what a chat costs on a node, beside two services without a queue. Everything runs on this machine.

*usual* is a Starlette route with httpx, line by line; *floor* is the same with aiohttp reading whatever arrived. The
services take turns within each round, and ratios are taken within a round, because a machine is never quiet. Loads:
`burst`, 32 deltas at once; `paced`, 32 deltas at a pace of 20 ms; each socket asks again when it has its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ops.benchmark.processes import Stage
from ops.benchmark.report import SERVICES, Found, as_json, bar_lines, bars, circumstances_lines, table
from ops.benchmark.runs import Run, capacity, measure, memory_per_socket


@dataclass(frozen=True)
class Plan:
    """How much is measured; times in seconds.

    Attributes:
        rounds: How often everything is measured but memory and `steps`.
        sockets: Sockets of a load.
        seconds: Length of one load.
        idle_sockets: Idle sockets that tell the memory of one.
        steps: Paced answers at once that are tried.
        stepped: Services that `steps` is tried on.
    """

    rounds: int = 3
    sockets: tuple[int, ...] = (1, 20, 100, 400)
    seconds: float = 3.0
    idle_sockets: int = 1000
    steps: tuple[int, ...] = (100, 200, 400, 600, 800, 1000)
    stepped: tuple[str, ...] = SERVICES


QUICK = Plan(rounds=1, sockets=(100,), seconds=1.5, idle_sockets=300, steps=(400,), stepped=("imstream",))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _progress(text: str) -> None:
    sys.stderr.write(text + "\n")


def _round(stage: Stage, plan: Plan) -> list[Run]:
    kinds = [("single", 1)] + [(load, sockets) for load in ("burst", "paced") for sockets in plan.sockets]
    return [measure(stage, name, load, sockets, plan.seconds) for load, sockets in kinds for name in SERVICES]


def _find(stage: Stage, plan: Plan, circumstances: dict[str, object]) -> Found:
    _progress("memory of idle sockets")
    idle = {name: memory_per_socket(service, plan.idle_sockets) for name, service in stage.services.items()}
    rounds = []
    for number in range(1, plan.rounds + 1):
        _progress(f"round {number} of {plan.rounds}: {', '.join(SERVICES)} in turns")
        rounds.append(_round(stage, plan))
    answers, runs = {}, []
    for name in plan.stepped:
        _progress(f"paced answers at once: {name}")
        answers[name], told = capacity(stage, name, list(plan.steps), plan.seconds)
        runs += told
    return Found(rounds, idle, answers, runs, circumstances)


def _circumstances(loop: str) -> dict[str, object]:
    packages = ("imstream", "aiohttp", "httpx", "redis", "starlette", "uvicorn", "uvloop", "websockets")
    return {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "event_loop": loop,
        "versions": {package: metadata.version(package) for package in packages},
    }


def main() -> int:
    """Measure, and tell; the exit code is 1 when a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="ops/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round, 100 sockets: less than a minute, less sure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop", help="event loop of all services")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="run the node under cProfile; read it with pstats")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # so that everything started is ended
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    circumstances = _circumstances(given.loop)
    profile = given.profile.resolve() if given.profile else None
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="imstream-bench-") as folder,
        Stage(Path(folder), loop=given.loop, profile=profile) as stage,
    ):
        found = _find(stage, QUICK if given.quick else Plan(), circumstances)
    _say(table(found))
    results = bars(found)
    _say(bar_lines(results))
    _say(f"{circumstances_lines(found)}; {time.monotonic() - began:.0f} s in all")
    if given.json:
        given.json.write_text(json.dumps(as_json(found), indent=1))
    return 0 if all(met for met, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
