"""`ops/chaos`: kills, freezes and restarts nodes, Redis, the AI backend and the load balancer at random, and breaks the
connections of clients, while these send messages. Then everything is restored, and every accepted message is accounted
for. The schedule of faults depends only on the seed.

The exit code is 1 if a message was lost, duplicated, answered wrongly or given up, or if anything is left over.
"""  # noqa: D205 - the help text of the command

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


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parse() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(
        prog="ops/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="seed of the schedule; by default a random one, which is printed")
    parser.add_argument("--seconds", type=float, default=120, help="duration (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=3, help="nodes, besides one that is killed for good (%(default)s)")
    parser.add_argument("--clients", type=int, default=18, help="number of clients (%(default)s)")
    parser.add_argument("--rate", type=float, default=8, help="messages per second of all clients (%(default)s)")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for the last answers (%(default)s)")
    parser.add_argument(
        "--balancer",
        choices=["any", "haproxy", "nginx", "none"],
        default="any",
        help="load balancer; any: an installed one, otherwise clients choose a node (%(default)s)",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder for the logs of each run (%(default)s)")
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
    """Run and report; the exit code is 1 if there is any problem."""
    plan, folder = _parse()
    folder.mkdir(parents=True)
    _print(str(plan))
    # Handled like Ctrl-C: everything that was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results, streams = asyncio.run(run(plan, folder))
    except KeyboardInterrupt:
        return 130
    shutil.rmtree(folder / "redis-data", ignore_errors=True)
    _print(table(results))
    if results.clean:
        return 0
    _print(problems(results, streams))
    return 1


if __name__ == "__main__":
    sys.exit(main())
