"""A view of all nodes, and of the backends as each of them sees them, for `imstream nodes` and `imstream backends`."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from pydantic_core import from_json, to_json

from imstream.clock import milliseconds, now_ms, time_of, to_timedelta
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.redis.client import RedisClient, to_dict
from imstream.settings import Settings
from imstream.store.leases import Holder, is_node_id
from imstream.store.scripts import LUA

BACKENDS_TTL = timedelta(minutes=1)  # how long the states of a node that has ended are kept
BackendState = Mapping[str, str | int | None]


@dataclass(frozen=True, slots=True)
class NodeOverview:
    """A node of the directory. None: its release does not record it, or no process runs the node."""

    node: str
    state: Literal["running", "stopping", "dead"]  # stopping: after SIGTERM or `imstream drain`; dead: without a lease
    last_seen: timedelta
    lease: timedelta | None = None  # how long it lasts unless it is renewed
    address: str | None = None
    host: str | None = None
    pid: int | None = None
    instance: str | None = None  # the process that holds the lease, as `imstream drain` names it
    version: str | None = None  # its release
    sessions: int | None = None
    running: int | None = None  # requests that it works on, of any stream
    not_ready: str | None = None  # why it could not serve when it last renewed its lease; empty if it could
    reads: int | None = None  # the newest schema of requests that it supports; those of a newer one wait elsewhere
    metrics: str | None = None  # address of its `/metrics`; empty if it serves none
    paused: str | None = None  # why an operator has paused it; None also if none has
    unfinished: int = 0  # requests in its stream
    oldest: timedelta | None = None  # the age of the oldest of them
    adopter: str | None = None  # the node that has adopted its stream
    helpers: Mapping[str, int] | None = None  # other nodes that work on requests of its stream, and on how many

    @property
    def condition(self) -> str:
        """Its state, or the reason why a running node does not work."""
        if self.state != "running":
            return self.state
        return "not ready" if self.not_ready else "paused" if self.paused else self.state

    def unsettled(self) -> Iterator[str]:
        """Why no other node should be stopped now."""
        if self.state != "running":
            yield "no process runs it" if self.state == "dead" else "it is stopping"
        elif self.not_ready:
            yield f"it is not ready: {self.not_ready}"
        if self.adopter is not None:
            yield f"node {self.adopter} has adopted its stream"
        for helper, count in (self.helpers or {}).items():
            yield f"node {helper} works on {count} of its requests"


async def redis_now(redis: RedisClient) -> int:
    """The time of Redis in milliseconds since 1970, as in entry ids."""
    seconds, microseconds = await redis.execute("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


async def holders(redis: RedisClient, keys: Keys) -> dict[str, Holder | None]:
    """The nodes of the directory, each with the process that runs it. Raises `StoreError`."""
    names = [node for node in await redis.execute("ZRANGE", keys.nodes(), 0, -1) if is_node_id(node)]
    leases = await asyncio.gather(*(redis.execute("GET", keys.lease(node)) for node in names))
    return {node: Holder.decode(lease) if lease else None for node, lease in zip(names, leases, strict=True)}


async def inspect_nodes(redis: RedisClient, keys: Keys) -> list[NodeOverview]:
    """All nodes of the directory, by name. Raises `StoreError`."""
    rows = await redis.execute("ZRANGE", keys.nodes(), 0, -1, "WITHSCORES")
    now = await redis_now(redis)
    found = (_inspect(redis, keys, node, now, to_timedelta(now - seen)) for node, seen in rows if is_node_id(node))
    return sorted(await asyncio.gather(*found), key=lambda one: one.node)


async def _inspect(redis: RedisClient, keys: Keys, node: str, now: int, last_seen: timedelta) -> NodeOverview:
    lease, left, adopter, status, unfinished, first, pending = await asyncio.gather(
        redis.execute("GET", keys.lease(node)),
        redis.execute("PTTL", keys.lease(node)),
        redis.execute("GET", keys.adopter(node)),
        redis.execute("HGETALL", keys.status(node)),
        redis.execute("XLEN", keys.requests(node)),
        redis.execute("XRANGE", keys.requests(node), "-", "+", "COUNT", 1),
        _pending(redis, keys.requests(node)),
    )
    oldest = to_timedelta(max(0, now - time_of(first[0][0]))) if first else None
    helpers = {consumer: count for consumer, count in pending.items() if consumer != node}
    found: dict[str, Any] = {"unfinished": unfinished, "oldest": oldest, "adopter": adopter, "helpers": helpers}
    if lease is None:
        return NodeOverview(node, "dead", last_seen, **found)
    holder, known = Holder.decode(lease), to_dict(status)
    if known.get("instance") != holder.instance:  # of a process before, and this one is of an older release
        known = {}
    found |= {"address": holder.address, "host": holder.host, "pid": holder.pid or None, "instance": holder.instance}
    found |= {name: known.get(name) for name in ("version", "not_ready", "metrics")}
    found |= {name: number_in(known, name) for name in ("sessions", "running", "reads")}
    state: Literal["stopping", "running"] = "stopping" if holder.stopping else "running"
    lasts = to_timedelta(left) if left >= 0 else None
    return NodeOverview(node, state, last_seen, lasts, paused=known.get("paused") or None, **found)


async def _pending(redis: RedisClient, stream: str) -> dict[str, int]:
    try:
        summary = await redis.execute("XPENDING", stream, GROUP)
    except StoreRefused:  # no such stream or group
        return {}
    return {consumer: int(count) for consumer, count in summary[3] or ()}


def number_in(fields: Mapping[str, str], name: str) -> int | None:
    """The number in a field; None for anything else."""
    text = fields.get(name, "")
    return int(text) if text.isdecimal() else None


class BackendStates:
    """Writes the states of this node, and reads those of all nodes."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._key = self._keys.backends(settings.node)
        self._written: Mapping[str, BackendState] = {}
        self._written_at = 0

    async def publish(self, states: Mapping[str, BackendState]) -> None:
        """Write the states if they have changed, or would expire soon. Raises `StoreError`."""
        now = now_ms()
        if states == self._written and now - self._written_at < milliseconds(BACKENDS_TTL) / 2:
            return
        fields = [part for name, state in states.items() for part in (name, to_json({**state, "at": now}).decode())]
        await LUA["publish_backends"].run(self._redis, (self._key,), (milliseconds(BACKENDS_TTL), *fields))
        self._written, self._written_at = states, now

    async def read(self) -> dict[str, dict[str, Any]]:
        """The states, by node and name. Nodes that do not publish them have none. Raises `StoreError`."""
        nodes = sorted(await self._redis.execute("ZRANGE", self._keys.nodes(), 0, -1))
        hashes = await asyncio.gather(*(self._redis.execute("HGETALL", self._keys.backends(node)) for node in nodes))
        return {node: decode_states(found) for node, found in zip(nodes, hashes, strict=True)}


def decode_states(found: Any) -> dict[str, Any]:  # noqa: ANN401 - what Redis answers
    """The states of one node, by name."""
    states = dict[str, Any]()
    for name, text in to_dict(found).items():
        with suppress(ValueError):  # written by hand
            states[name] = from_json(text)
    return {name: state for name, state in states.items() if isinstance(state, dict)}
