"""Warnings about Redis settings that can lose accepted messages."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from imstream.errors import StoreError
from imstream.redis.client import RedisClient

MIN_REPLICAS = 2
"""Replicas with which a master can do without one of them: after a fail-over, the old master is missing."""


async def warnings(redis: RedisClient) -> list[str]:
    """One sentence for each unsafe setting of a master, with the setting to use instead."""
    try:
        infos = [
            await redis.execute_on_masters("INFO", section) for section in ("memory", "persistence", "replication")
        ]
    except StoreError as error:
        return [f"cannot read the settings of Redis: {error}"]
    found: dict[str, list[str]] = defaultdict(list)
    for master in infos[0]:
        # A master promoted between two requests has not answered all of them.
        lines = "\n".join(replies.get(master, "") for replies in infos).splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        for sentence in _warnings_of_master(info, replicated=redis.topology != "server"):
            found[sentence].append(master)
    return [
        sentence if len(masters) == len(infos[0]) else f"{sentence} (on {', '.join(masters)})"
        for sentence, masters in found.items()
    ]


def _warnings_of_master(info: Mapping[str, str], *, replicated: bool) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") or (policy.startswith("volatile") and info.get("maxmemory", "0") != "0"):
        yield (
            f"Redis may evict accepted messages when memory is full (maxmemory-policy {policy}); "
            "set maxmemory-policy noeviction"
        )
    if info.get("aof_enabled") == "0":
        yield "Redis loses accepted messages when it restarts (appendonly no); set appendonly yes"
    replicas = int(info.get("connected_slaves", "0"))
    # INFO counts good replicas only where min-replicas-to-write is set.
    if "min_slaves_good_slaves" in info:
        if replicas < MIN_REPLICAS:
            yield (
                f"Redis accepts no messages (NOREPLICAS) when it lacks a replica, as after a fail-over, and has "
                f"{replicas}; use two replicas, or set min-replicas-to-write 0"
            )
    elif replicated or replicas:
        yield (
            "Redis loses messages accepted since the last replication when it fails over (min-replicas-to-write 0); "
            f"{'' if replicas >= MIN_REPLICAS else 'use two replicas and '}set min-replicas-to-write 1"
        )
