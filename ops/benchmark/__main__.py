"""`ops/bench`: the cost of a chat on a node, compared with two services without a queue, all on this machine.

*typical* is a Starlette route with httpx, line by line; *baseline* is the same with aiohttp, which reads whatever has
arrived. The services alternate within each round, and ratios are taken within a round, because other load on the
machine varies; sockets stay open between rounds. Loads: `burst`, 32 deltas at once; `paced`, 32 deltas 20 ms apart;
each socket sends its next message when the answer is complete.

Then two more nodes alternate: one without guards, and one with all of them. `--guards` measures only these, and each
guard alone. `--against` measures only this node and that of another release, `--rollup` only nodes with different
IMSTREAM_ROLLUP.

`ops/bench scale` is another measurement: many sockets, a reconnect storm, and the figures of the capacity model.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.benchmark import guards, releases, rollup, scale
from ops.benchmark.processes import Stage
from ops.benchmark.report import SERVICES, Results, as_json, bar_lines, bars, circumstances, circumstances_lines, table
from ops.benchmark.runs import Run, alternate, capacity, memory_per_socket


@dataclass(frozen=True)
class Plan:
    """The extent of the measurement; times in seconds.

    Attributes:
        rounds: Number of times each load is applied to each service.
        sockets: Numbers of sockets of a load.
        seconds: Duration of one load.
        idle_sockets: Number of idle sockets that the memory of one is derived from.
        steps: Numbers of concurrent paced answers that are tried.
        step_seconds: Duration of the load of one step.
        stepped: Services that `steps` is tried on.
        guards: Share of the rounds of `ops.benchmark.guards`; half of it if each guard is also measured alone.
    """

    rounds: int = 7
    sockets: tuple[int, ...] = (1, 20, 100, 400)
    seconds: float = 1.5
    idle_sockets: int = 1000
    steps: tuple[int, ...] = (100, 200, 300, 400, 600, 800, 1000, 1200, 1600, 2000)
    step_seconds: float = 3.0
    stepped: tuple[str, ...] = SERVICES
    guards: float = 1.0


QUICK = Plan(rounds=3, sockets=(100,), seconds=1.5, idle_sockets=300, steps=(400,), stepped=("imstream",), guards=0.1)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _progress(text: str) -> None:
    sys.stderr.write(text + "\n")


def _measure(stage: Stage, plan: Plan, about: dict[str, Any], profile: Path | None) -> Results:
    stage.start_services(profile=profile)
    _progress("memory of idle sockets")
    idle = {name: memory_per_socket(service, plan.idle_sockets) for name, service in stage.services.items()}
    rounds = []
    for load, sockets in [("single", 1), *((load, sockets) for load in ("burst", "paced") for sockets in plan.sockets)]:
        _progress(f"{load}, {sockets} sockets: {', '.join(SERVICES)} alternating, {plan.rounds} rounds")
        rounds += alternate(stage, SERVICES, load, sockets, plan.seconds, rounds=plan.rounds)
    answers, runs = {}, []
    for name in plan.stepped:
        _progress(f"concurrent paced answers: {name}")
        answers[name], capacity_runs = capacity(stage, name, list(plan.steps), plan.step_seconds)
        runs += capacity_runs
    return Results(rounds, idle, answers, runs, about)


def _measure_guards(stage: Stage, plan: Plan, *, alone: bool, profile: Path | None) -> list[list[Run]]:
    _progress(f"guards: none, {'each one, ' if alone else ''}and all of them, alternating")
    share = plan.guards / 2 if alone else plan.guards
    return guards.compare(stage, share=share, alone=alone, profile=profile)


def main() -> int:
    """Measure and report; the exit code is 1 if a limit is exceeded."""
    for number in (signal.SIGTERM, signal.SIGINT):  # so that everything that was started is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if sys.argv[1:2] == ["scale"]:
        return scale.main(sys.argv[2:])
    given = _options()
    plan = QUICK if given.quick else Plan()
    about = circumstances(given.loop)
    profile = given.profile.resolve() if given.profile else None
    began = time.monotonic()
    if given.against:
        return _compare_releases(given.against, given.loop, given.json)
    if given.rollup:
        return _compare_rollups(given.loop, given.json)
    with _stage(given.loop) as stage:
        found = None if given.guards else _measure(stage, plan, about, profile)
        guarded = _measure_guards(stage, plan, alone=given.guards, profile=profile if given.guards else None)
    results = [*(bars(found) if found else []), *guards.bars(guarded)]
    if found:
        _print(table(found))
    _print(guards.table(guarded))
    _print(bar_lines(results))
    if found:
        _print(circumstances_lines(found))
    _print(f"{time.monotonic() - began:.0f} s in total")
    if given.json:
        report = {**(as_json(found) if found else {"circumstances": about}), **guards.as_json(guarded)}
        report["bars"] = [{"met": met, "text": text} for met, text in results]
        given.json.write_text(json.dumps(report, indent=1))
    return 0 if all(met for met, _ in results) else 1


@contextmanager
def _stage(loop: str) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="imstream-bench-") as folder, Stage(Path(folder), loop=loop) as stage:
        yield stage


def _compare_releases(python: str, loop: str, json_file: Path | None) -> int:
    with _stage(loop) as stage:
        rounds = releases.compare(stage, python)
    results = releases.bars(rounds)
    _print(releases.table(rounds))
    _print(bar_lines(results))
    if json_file:
        json_file.write_text(json.dumps(releases.as_json(rounds), indent=1))
    return 0 if all(met for met, _ in results) else 1


def _compare_rollups(loop: str, json_file: Path | None) -> int:
    with _stage(loop) as stage:
        found = rollup.compare(stage)
    _print(rollup.table(found))
    if json_file:
        json_file.write_text(json.dumps(rollup.as_json(found, circumstances(loop)), indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ops/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three rounds, 100 sockets: two minutes, less precise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop", help="event loop of all services")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="run the node (with --guards: the one with all guards) under cProfile; for pstats",
    )
    parser.add_argument("--guards", action="store_true", help="measure only the cost of guards, each alone and all")
    parser.add_argument(
        "--rollup", action="store_true", help="measure only nodes with IMSTREAM_ROLLUP of 0, 25 and 40 ms, paced"
    )
    parser.add_argument(
        "--against",
        type=os.path.abspath,  # not resolved: the interpreter of a virtual environment is a link
        metavar="PYTHON",
        help="measure only this node and the one of this interpreter, which has another release installed",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
