"""Leases and adoption. A node is alive while its lease exists, and only then (I7).

The stream of a dead node is adopted by one living node until the node is back or the stream is empty (I1).
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from time import monotonic
from typing import Any, Self

from pydantic_core import from_json, to_json

from imstream.clock import milliseconds, now_ms, to_timedelta
from imstream.errors import StoreError, StoreRefused
from imstream.keys import GROUP, Keys
from imstream.metrics import Metrics
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.scripts import LUA

MAX_FIELD = 256  # characters of a text field in a lease; longer ones are ignored
_MAX_PID = 2**31 - 1
_NODE = re.compile(r"[A-Za-z0-9._-]{1,64}")

_REDIS_RUN_TTL = timedelta(days=7)
"""How long it is remembered on which run of Redis a node last held its lease: the longest expected downtime."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that runs a node. `instance` is unique to it, and `machine` to the machine or container of its pid.

    `stopping`: it is stopping, so its deliveries do not count as ones that killed it.
    """

    instance: str
    host: str
    machine: str
    pid: int
    address: str
    stopping: bool = False

    def encode(self) -> str:
        """As JSON of schema version 1, without its optional field `v`. Releases before `v` allow only the first five
        fields; to them, a process that is stopping is an unknown holder."""  # noqa: D205, D209 - one thought
        return to_json({name: value for name, value in asdict(self).items() if value is not False}).decode()

    @classmethod
    def decode(cls, text: str) -> Self:
        """From JSON. Unknown fields are ignored, and invalid ones replaced."""
        try:
            read: Any = from_json(text)
        except ValueError:
            read = None
        fields: dict[str, Any] = read if isinstance(read, dict) else {}
        pid = fields.get("pid")
        return cls(
            instance=_text(fields.get("instance"), text[:MAX_FIELD]),
            host=_text(fields.get("host"), "?"),
            machine=_text(fields.get("machine"), ""),
            pid=pid if type(pid) is int and 0 < pid <= _MAX_PID else 0,
            address=_text(fields.get("address"), "?"),
            stopping=fields.get("stopping") is True,
        )


@dataclass(frozen=True, slots=True)
class Held:
    """The lease is ours. `restarted`: Redis was restarted after its last holder, which may have ended with it.

    `older_by`: Redis has the lease as of a renewal so long before our last one: it has lost later writes.
    """

    restarted: bool = False
    older_by: timedelta | None = None


@dataclass(frozen=True, slots=True)
class HeldByOther:
    """Another process holds the lease, for at least the time that is remaining."""

    holder: Holder
    remaining: timedelta


class Leases:
    """The lease of this node, those of other nodes, and the adoption of dead nodes' streams."""

    def __init__(self, redis: RedisClient, settings: Settings, metrics: Metrics | None = None) -> None:
        self.node = settings.node
        self._metrics = metrics or Metrics()
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._duration = milliseconds(settings.lease)
        self._dead_age = milliseconds(settings.dead_age)
        self._retire_after = milliseconds(settings.retire_after)
        self.status: Callable[[], Mapping[str, str | int]] = dict
        """Returns the fields that are recorded with each renewal, for `imstream nodes`."""
        self._renewed = 0  # when we last renewed, by Redis' clock (ms)

    async def acquire(self, holder: Holder, *, dead: str = "") -> Held | HeldByOther:
        """Acquire or renew the lease of this node. `dead`: the instance of a dead holder, whose lease is taken over."""
        of_node = (self._keys.lease, self._keys.redis_run, self._keys.requests, self._keys.status)
        status = [part for pair in self.status().items() for part in pair]
        status += ["instance", holder.instance] if status else []
        lease = (holder.instance, holder.encode(), self._duration, dead)
        consumer = (GROUP, self.node, milliseconds(_REDIS_RUN_TTL))
        keys = [key(self.node) for key in of_node]
        sent = monotonic()
        answer = await LUA["acquire_lease"].run(self._redis, keys, (*lease, *consumer, *status))
        if answer[0] == "held":
            self._metrics.redis_clock.adjust(int(answer[4]), sent=sent)
            self._metrics.saw_stream(self.node, int(answer[2]), answer[3])
            before, self._renewed, found = self._renewed, int(answer[4]) if status else 0, answer[5]
            older = before - int(found) if found.isdecimal() else 0
            return Held(restarted=answer[1] == "1", older_by=to_timedelta(older) if before and older > 0 else None)
        return HeldByOther(Holder.decode(answer[1]), _time_left(answer[2]) or timedelta())

    async def release(self, holder: Holder) -> None:
        """Release the lease: the node's stream may be adopted at once."""
        await LUA["release_lease"].run(self._redis, (self._keys.lease(self.node),), (holder.instance,))

    async def redis_restarted_since(self, node: str) -> bool:
        """Whether Redis was restarted since a node last held its lease: the node may have ended with it."""
        return bool(await LUA["redis_restarted"].run(self._redis, (self._keys.redis_run(node),), ()))

    async def heartbeat(self) -> None:
        """Update this node in the directory of nodes."""
        await self._redis.execute("ZADD", self._keys.nodes(), now_ms(), self.node)

    async def other_nodes(self) -> dict[str, timedelta]:
        """The other nodes of the directory, and how long ago each was last seen. Invalid node ids are ignored."""
        rows = await self._redis.execute("ZRANGE", self._keys.nodes(), 0, -1, "WITHSCORES")
        now = now_ms()
        return {node: to_timedelta(now - at) for node, at in rows if node != self.node and is_node_id(node)}

    async def time_left(self, nodes: Iterable[str]) -> dict[str, timedelta | None]:
        """How long the lease of each node lasts unless it is renewed; None when there is no lease."""
        names = list(nodes)
        asked = (self._redis.execute("PTTL", self._keys.lease(node)) for node in names)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return {node: _time_left(answer) for node, answer in zip(names, answers, strict=True)}

    async def unfinished(self, node: str) -> int:
        """The number of requests in the stream of a node."""
        return int(await self._redis.execute("XLEN", self._keys.requests(node)))

    async def adopt(self, node: str) -> int | None:
        """Adopt the stream of a node, or renew the adoption, for the duration of a lease.

        Returns the number of its unfinished requests; None when the node is alive, or another one has its stream.
        """
        keys = (self._keys.lease(node), self._keys.adopter(node), self._keys.requests(node))
        verdict, *rest = await LUA["adopt"].run(self._redis, keys, (self.node, self._duration))
        if verdict != "adopted":
            return None
        self._metrics.saw_stream(node, int(rest[0]), rest[1])
        return int(rest[0])

    async def has_pending(self, node: str) -> bool:
        """Whether requests in the stream of a node are pending under our name."""
        try:
            rows = await self._redis.execute("XPENDING", self._keys.requests(node), GROUP, "-", "+", 1, self.node)
        except StoreRefused as error:
            if str(error).startswith("NOGROUP"):
                return False
            raise
        return bool(rows)

    async def release_stream(self, node: str) -> bool:
        """End the adoption. False when requests are still pending under our name."""
        self._metrics.forget_stream(node)
        keys = (self._keys.requests(node), self._keys.adopter(node))
        return int(await LUA["remove_consumer"].run(self._redis, keys, (GROUP, self.node))) == 0

    async def retire(self, node: str) -> bool:
        """Delete the keys of a node; its dead letters expire. False when it is alive, adopted, or has requests."""
        keys, gone_since = self._keys, now_ms() - self._retire_after
        deleted = (keys.lease, keys.adopter, keys.requests, keys.load, keys.inbox, keys.redis_run)
        of_node = [key(node) for key in (*deleted, keys.dead, keys.status)]
        if not await LUA["retire"].run(self._redis, of_node, (self._dead_age,)):
            return False
        return bool(await LUA["unlist"].run(self._redis, (keys.nodes(),), (node, gone_since)))


def is_node_id(text: str) -> bool:
    """Whether a member of the directory, which may be written by hand, is a node id."""
    return _NODE.fullmatch(text) is not None


def _time_left(answer: int | BaseException) -> timedelta | None:
    if isinstance(answer, StoreError):  # unknown: the node counts as alive
        return timedelta.max
    if isinstance(answer, BaseException):
        raise answer
    if answer == -1:  # set by hand, without expiry
        return timedelta.max
    return to_timedelta(answer) if answer >= 0 else None


def _text(value: object, default: str) -> str:
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_FIELD else default
