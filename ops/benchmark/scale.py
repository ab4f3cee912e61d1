"""`ops/bench scale`: the figures of a capacity model, and a check of it. Linux only; all load stays on 127.0.0.0/8.

1. Idle: as many sockets on one node as the limit of open files allows. Memory of each, CPU of logins and heartbeats.
2. Storm: users with answers under way lose their node (SIGKILL) and connect to another one; every text is checked.
3. Chats: two loads of paced answers of different lengths give the CPU, Redis commands and bytes of a chat, each as a
   part for the chat and a part for each second of its answer, and the memory of a reply, with a part for each listpack.
4. Memory of queued messages and dead letters in Redis.
5. The check: a third load, on a new node, whose CPU and memory `ops.benchmark.capacity` predicts from 1 to 3.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ops.benchmark import capacity
from ops.benchmark.processes import Stage
from ops.benchmark.report import BUSY, bar_lines, circumstances
from ops.benchmark.scale_parts import CHATS, CHECK, SMALL, Plan, chats, idle, redis_messages, storm


def measure(stage: Stage, plan: Plan) -> Iterator[tuple[str, Any]]:
    """All parts, one after the other; see the module docstring."""
    _progress("idle sockets")
    yield "idle", idle(stage, plan)
    _progress("reconnect storm")
    yield "storm", storm(stage, plan)
    node = stage.start_node("chats", redis_url=stage.redis_url(CHATS))
    for name, load in (("short", plan.short), ("long", plan.long)):
        _progress(f"chats: {load.chats:g} a second of {load.length:g} s")
        yield name, chats(stage, node, CHATS, load)
    node.stop()
    _progress("queued messages and dead letters")
    yield "messages", redis_messages(stage, plan)
    _progress(f"the check: {plan.check.chats:g} chats a second of {plan.check.length:g} s")
    node = stage.start_node("check", redis_url=stage.redis_url(CHECK))
    yield "check", chats(stage, node, CHECK, plan.check)
    node.stop()


def bars(found: Mapping[str, Any], *, predicts: bool) -> list[tuple[bool, str]]:
    """Whether every answer was complete and right, and with `predicts` whether each prediction holds."""
    seen = found["storm"]
    text = f"storm: {seen['right']} of {seen['clients']} answers complete and right, {seen['under_way']} under way"
    results = [(seen["right"] == seen["clients"], text)]
    if "idle" in found:
        sockets, beats = found["idle"]["sockets"], found["idle"]["heartbeats"]
        results.append((beats == sockets, f"idle sockets: {beats} of {sockets} heartbeats answered"))
    for name in ("short", "long", "check"):
        if name in found:
            right, count, skipped = (found[name][key] for key in ("right", "chats", "skipped"))
            results.append(
                (right == count, f"chats ({name}): {right} of {count} complete and right, {skipped} skipped")
            )
    if predicts:
        limit = capacity.TOLERANCE
        results += [(abs(it.deviation) <= limit, f"{it}, at most {limit:.0%}") for it in capacity.check(found)]
    return results


def main(arguments: list[str]) -> int:
    """Measure and report; the exit code is 1 if an answer is missing or wrong, or a prediction does not hold."""
    given = _options(arguments)
    plan = SMALL if given.small else Plan(idle=given.sockets)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="imstream-bench-") as folder, Stage(Path(folder), loop="uvloop") as stage:
        parts = [("storm", storm(stage, plan))] if given.storm else measure(stage, plan)
        found = {"circumstances": circumstances("uvloop"), "plan": asdict(plan), **dict(parts)}
    foreign = max((found[name]["foreign"] for name in ("short", "long", "check") if name in found), default=None)
    found["foreign"] = foreign
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    results = bars(found, predicts=not given.small and not given.storm)
    lines = [*capacity.text(found), bar_lines(results)]
    if foreign is not None:
        doubt = "; TOO MUCH for reliable figures: run again on an idle machine" if foreign > BUSY else ""
        lines.append(f"CPUs used by other processes: {foreign:.2f}{doubt}")
    sys.stdout.write("\n".join([*lines, f"{time.monotonic() - began:.0f} s in total"]) + "\n")
    return 0 if all(met for met, _ in results) else 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ops/bench scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    parser.add_argument("--sockets", type=int, default=Plan.idle, help="maximum number of idle sockets (%(default)s)")
    parser.add_argument("--storm", action="store_true", help="only the reconnect storm")
    parser.add_argument("--small", action="store_true", help="a few sockets for a few seconds: a test of this program")
    return parser.parse_args(arguments)


def _progress(text: str) -> None:
    sys.stderr.write(text + "\n")
