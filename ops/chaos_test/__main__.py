"""`ops/chaos`: kills, freezes and restarts nodes, Redis, the AI backend and the load balancer at random, and breaks the
connections of clients, while these ask questions. Then everything is brought back, and every message that was ever
accepted is accounted for. What goes wrong, and when, is drawn from the seed alone.

The exit code is 1 when a message was lost, duplicated, answered wrongly or given up, or when something is left over.
"""  # noqa: D205 - the help text of the command

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from ops.chaos_test.report import problems, table
from ops.chaos_test.run import Plan, run
from ops.chaos_test.stage import installed_balancers

FOLDER = Path(".imstream/chaos")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parse() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(
        prog="ops/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="what everything is drawn from; made up and printed when not given")
    parser.add_argument("--seconds", type=float, default=120, help="how long it goes on (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=3, help="nodes, besides one that dies for good (%(default)s)")
    parser.add_argument("--clients", type=int, default=18, help="clients (%(default)s)")
    parser.add_argument("--rate", type=float, default=8, help="questions per second, all together (%(default)s)")
    parser.add_argument("--patience", type=float, default=60, help="seconds for the last answers (%(default)s)")
    parser.add_argument(
        "--balancer",
        choices=["any", "haproxy", "nginx", "none"],
        default="any",
        help="what is in front of the nodes; any: one that is installed, else clients choose a node (%(default)s)",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the logs of each run are kept (%(default)s)")
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed  # noqa: S311 - draws faults, no secrets
    balancer = given.balancer
    if balancer == "any":
        installed = installed_balancers()
        balancer = installed[seed % len(installed)] if installed else None
    elif balancer == "none":
        balancer = None
    elif balancer not in installed_balancers():
        parser.error(f"{balancer} is not installed")
    plan = Plan(seed, given.seconds, given.nodes, given.clients, given.rate, given.patience, balancer)
    folder = given.folder.resolve() / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{seed}"
    return plan, folder


def main() -> int:
    """Run it, and tell; the exit code is 1 when anything is wrong."""
    plan, folder = _parse()
    folder.mkdir(parents=True)
    _say(str(plan))
    # As Ctrl-C does: everything that was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found, streams = asyncio.run(run(plan, folder))
    except KeyboardInterrupt:
        return 130
    shutil.rmtree(folder / "redis-data", ignore_errors=True)
    _say(table(found))
    if found.clean:
        return 0
    _say(problems(found, streams))
    return 1


if __name__ == "__main__":
    sys.exit(main())
