"""What an operator should know about Redis before trusting it with messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from imstream.errors import StoreError
from imstream.redis.client import RedisClient

_SECTIONS = ("memory", "persistence", "replication")


async def warnings(redis: RedisClient) -> list[str]:
    """One sentence for each setting of a master that can lose accepted messages, saying what to set instead."""
    found: dict[str, list[str]] = defaultdict(list)
    try:
        infos = [await redis.on_every_master("INFO", section) for section in _SECTIONS]
    except StoreError as error:
        return [f"cannot look at the settings of Redis: {error}"]
    for master in infos[0]:
        # One that was promoted between two questions has not answered all of them.
        info = _fields("\n".join(answers.get(master, "") for answers in infos))
        for sentence in _of_one(info, replicated=redis.topology != "server"):
            found[sentence].append(master)
    return [
        sentence if len(masters) == len(infos[0]) else f"{sentence} (on {', '.join(masters)})"
        for sentence, masters in found.items()
    ]


def _of_one(info: Mapping[str, str], *, replicated: bool) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") or (policy.startswith("volatile") and info.get("maxmemory", "0") != "0"):
        yield (
            f"Redis may evict accepted messages when memory is full (maxmemory-policy {policy}); "
            "set maxmemory-policy noeviction"
        )
    if info.get("aof_enabled") == "0":
        yield "Redis loses accepted messages when it restarts (appendonly no); set appendonly yes"
    # The count of replicas in step is there only where a number of them is asked for.
    if "min_slaves_good_slaves" not in info and (replicated or info.get("connected_slaves", "0") != "0"):
        yield (
            "Redis loses what it has accepted since its replicas were last in step when it fails over "
            "(min-replicas-to-write 0); set min-replicas-to-write 1"
        )


def _fields(text: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
