"""Inspects the state at the end of a run: the reply streams, and leftovers that should be gone."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import redis

from imstream.keys import GROUP, Keys
from ops.chaos_test.history import Entry, Recorded
from ops.chaos_test.parts import Part

KEYS = Keys()

SETTLE = 30.0
"""Time limit for leftovers to disappear after the last answer, in seconds: retiring and idle connections take some."""

MORE_FILES = 16
"""Maximum number of file descriptors that an idle node may have in addition to those at its start."""

MAX_MEMORY = 200 * 2**20
"""Maximum resident set of an idle node, in bytes; it starts with about 60 MB and keeps no messages."""

_PERMANENT = (":requests", ":load", ":dead", ":nodes")


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of an idle node."""

    files: int
    memory: int

    @classmethod
    def of(cls, part: Part) -> Self:
        """Measure a node."""
        return cls(part.open_files(), part.memory())


def connect(port: int, password: str) -> redis.Redis:
    """Connect to Redis with all permissions."""
    return redis.Redis(port=port, username="admin", password=password, decode_responses=True, socket_timeout=10)


def recorded(client: redis.Redis) -> Recorded:
    """All reply streams, by user and message id."""
    streams: Recorded = {}
    for key in client.scan_iter(f"{KEYS.prefix}:{{user:*}}:reply:*", count=1000):
        user, _, message_id = key.partition("}:reply:")
        entries: Any = client.xrange(key)
        streams[int(user.rpartition(":")[2]), message_id] = [_entry({"id": one, **fields}) for one, fields in entries]
    return streams


def _entry(fields: dict[str, str]) -> Entry:
    text, by = fields.get("text", ""), fields.get("by", "")
    return Entry(fields["event"], int(fields["attempt"]), text, by, fields)


async def find_leftovers(client: redis.Redis, nodes: Sequence[Part], leaver: str, before: Resources) -> list[str]:
    """Leftovers, one sentence each; waits up to `SETTLE` seconds for them to disappear."""
    deadline = asyncio.get_running_loop().time() + SETTLE
    names = [node.name.removeprefix("node ") for node in nodes]
    checks: list[Callable[[], list[str]]] = [
        lambda: _requests(client, [*names, leaver], living=names),
        lambda: _directory(client, names),
        lambda: _lasting_keys(client),
        lambda: [sentence for node in nodes for sentence in _resource_leaks(node, before)],
    ]
    while True:
        leftovers = [sentence for check in checks for sentence in check()]
        if not leftovers or asyncio.get_running_loop().time() > deadline:
            return leftovers
        await asyncio.sleep(0.5)


def _requests(client: redis.Redis, nodes: Sequence[str], living: Sequence[str]) -> list[str]:
    """Unfinished requests by stream, by user and by consumer; and consumers of dead nodes."""
    leftovers = []
    for node in nodes:
        stream, load = KEYS.requests(node), KEYS.load(node)
        unfinished: Any = client.xrange(stream)
        if unfinished:
            which = ", ".join(f"{fields.get('user')} {fields.get('message_id')}" for _, fields in unfinished[:10])
            leftovers.append(f"{len(unfinished)} requests in {stream}: {which}")
        if counts := client.hgetall(load):
            leftovers.append(f"users with unfinished requests in {load}: {counts}")
        if letters := client.xlen(KEYS.dead(node)):
            leftovers.append(f"{letters} dead letters in {KEYS.dead(node)}")
        for consumer in _consumers(client, stream):
            if consumer["pending"]:
                leftovers.append(f"{consumer['pending']} pending under {consumer['name']} in {stream}")
            if consumer["name"] not in living:
                leftovers.append(f"consumer {consumer['name']} in {stream}, a dead node")
    return leftovers


def _consumers(client: redis.Redis, stream: str) -> list[dict[str, Any]]:
    try:
        consumers: list[dict[str, Any]] = client.xinfo_consumers(stream, GROUP)
    except redis.ResponseError:  # no stream or no group
        return []
    return consumers


def _directory(client: redis.Redis, living: Sequence[str]) -> list[str]:
    known: Any = client.zrange(KEYS.nodes(), 0, -1)
    gone = set(known) - set(living)
    return [f"node {node} is dead and not retired from {KEYS.nodes()}" for node in sorted(gone)]


def _lasting_keys(client: redis.Redis) -> list[str]:
    with client.pipeline(transaction=False) as pipeline:
        keys = [key for key in client.scan_iter(count=1000) if not key.endswith(_PERMANENT)]
        for key in keys:
            pipeline.ttl(key)
        return [f"{key} never expires" for key, ttl in zip(keys, pipeline.execute(), strict=True) if ttl == -1]


def _resource_leaks(node: Part, before: Resources) -> list[str]:
    now = Resources.of(node)
    leftovers = []
    if now.files > before.files + MORE_FILES:
        leftovers.append(f"{node.name} has {now.files} open files, {before.files} at its start")
    if now.memory > MAX_MEMORY:
        leftovers.append(f"{node.name} holds {now.memory / 2**20:.0f} MB")
    return leftovers
