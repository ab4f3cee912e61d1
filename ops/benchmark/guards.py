"""The cost of guards: a node with all of them, compared with one without any, and with nodes that have one each.

All get the same messages, in the middle of a conversation; see `ops.benchmark.load`. Costs per socket and login (a
token, an origin) are not included. The backend counts the moderated texts, which are checked.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

from ops.benchmark.processes import Stage
from ops.benchmark.report import BUSY
from ops.benchmark.runs import Generator, Run, alternate, measure_once

OFF, ON, MODERATION = "off", "on", "moderation"
SOCKETS = 100
LOADS = {"burst": (40, 0.6), "paced": (16, 1.2)}
"""Number of rounds of each load, and seconds of a round. Many short rounds, because differences are a few hundredths
and other load on the machine varies."""

LIMIT = 1.15
"""Maximum cost of all guards, as a multiple of the cost without any."""

_SECRET = "the secret of the benchmark, of enough bytes"  # noqa: S105 - of nothing else
_WORDS = 100_000
_MANY = 1_000_000
"""A limit that no load reaches: it counts and refuses nothing."""

_NONE: dict[str, object] = {
    "auth": "none",
    "origins": "*",
    "frame_rate": 0,
    "chats_per_minute": 0,
    "daily_quota": 0,
    "lock_after": 0,
    "ban_after": 0,
}


def settings(stage: Stage) -> dict[str, dict[str, object]]:
    """The settings that enable guards, by their name in the table."""
    words = stage.folder / "words.txt"
    if not words.exists():
        write_words(words)
    return {
        "identity": {"auth": "jwt", "auth_secret": _SECRET, "origins": "same"},
        "limits": {"frame_rate": _MANY, "frame_burst": _MANY, "chats_per_minute": _MANY},
        "accounts": {"daily_quota": _MANY, "lock_after": 3, "ban_after": 10},
        "words": {"words": words, "words_action": "mask"},
        MODERATION: {"moderation_url": stage.ai_url},
        "prompt": {
            "system_prompt": "You help user {user}, briefly, in the language {language}. Today is {date}.",
            "prompt_template": "Somebody asks: {contents}",
        },
    }


def write_words(file: Path) -> None:
    """Write a list of words that occur in no load, half Latin, half Chinese. The list is always the same."""
    draw = random.Random(1)  # noqa: S311 - no secret
    latin, chinese = "abcdefghijklmnopqrstuvwxyz", [chr(code) for code in range(0x4E00, 0x9FA5)]
    words = set[str]()
    while len(words) < _WORDS // 2:
        words.add("zq" + "".join(draw.choices(latin, k=draw.randint(3, 10))))
    while len(words) < _WORDS:
        words.add("".join(draw.choices(chinese, k=draw.randint(3, 6))))
    file.write_text("\n".join(sorted(words)), "utf-8")


def compare(stage: Stage, *, share: float, alone: bool, profile: Path | None) -> list[list[Run]]:
    """Alternating runs of nodes without guards and with all, with `alone` also with each one; one list for each round.

    `share` is the share of all rounds that is run.
    """
    each = settings(stage)
    every: dict[str, Any] = {name: value for one in each.values() for name, value in one.items()}
    nodes: Mapping[str, Mapping[str, Any]] = {OFF: {}, **(each if alone else {}), ON: every}
    for name, own in nodes.items():
        stage.start_node(name, profile=profile if name == ON else None, **{**_NONE, **own})
    options = ("--talk", "--secret", _SECRET)
    found = []
    for load, (all_rounds, seconds) in LOADS.items():
        rounds = max(1, round(all_rounds * share))
        found += alternate(stage, list(nodes), load, SOCKETS, seconds, *options, rounds=rounds, measure=_measure)
    return found


def _measure(stage: Stage, name: str, generator: Generator) -> Run:
    before = _moderated(stage)
    run = measure_once(stage, name, generator)
    asked, chats = _moderated(stage) - before, run.seen["chats"]
    if asked < chats if name in {ON, MODERATION} else asked:
        sys.exit(f"{name}: {asked} texts were moderated, of {chats} chats")
    return run


def _moderated(stage: Stage) -> int:
    """The number of texts that the backend has moderated."""
    with urlopen(f"{stage.ai_url}/moderated", timeout=5) as answer:  # noqa: S310 - our own
        return int(answer.read())


def ratio(rounds: Sequence[Sequence[Run]], load: str, name: str) -> float:
    """CPU of a node and Redis divided by that without guards, within each round; the median of the rounds."""
    costs = [{run.service: run.cost for run in runs} for runs in rounds if runs[0].load == load]
    return median(cost[name] / cost[OFF] for cost in costs)


def table(rounds: Sequence[Sequence[Run]]) -> str:
    """One line for each load and node; medians over the rounds."""
    lines = ["load   guards      CPU s/1000 +Redis   ×off"]
    for load in LOADS:
        for name in dict.fromkeys(run.service for runs in rounds for run in runs):
            runs = [run for of_round in rounds for run in of_round if (run.load, run.service) == (load, name)]
            cpu = median(run.cpu / run.seen["chats"] for run in runs) * 1000
            redis_cpu = median(run.redis_cpu / run.seen["chats"] for run in runs) * 1000
            lines.append(f"{load:<6} {name:<11} {cpu:>10.3f} {redis_cpu:>6.3f} {ratio(rounds, load, name):>6.2f}")
    foreign = median(run.foreign for runs in rounds for run in runs)
    doubt = "; TOO MUCH for reliable ratios" if foreign > BUSY else ""
    return "\n".join([*lines, f"CPUs used by other processes: {foreign:.2f} (median of the runs){doubt}"])


def bars(rounds: Sequence[Sequence[Run]]) -> list[tuple[bool, str]]:
    """Whether the guards stay within their limit, and a sentence, for each load."""
    found = {load: ratio(rounds, load, ON) for load in LOADS}
    return [
        (value <= LIMIT, f"{load}, {SOCKETS} sockets, all guards on: {value:.2f} of all off, at most {LIMIT}")
        for load, value in found.items()
    ]


def as_json(rounds: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """All measurements, for programs."""
    return {"guards": [[asdict(run) for run in runs] for runs in rounds]}
