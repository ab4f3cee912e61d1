"""Leases: who runs which node now. Whether a node is alive is told by its lease and by nothing else (I7)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from pydantic_core import from_json, to_json

from imstream.clock import milliseconds, now_ms, to_timedelta
from imstream.errors import StoreError
from imstream.keys import GROUP, Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

MAX_FIELD = 256
"""Maximum length of a text in a lease. More is not read."""

_MAX_PID = 2**31 - 1

_NODE = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What the id of a node is, as in its setting."""

_ACQUIRE_LEASE = load_script("acquire_lease")
_RELEASE_LEASE = load_script("release_lease")
_REDIS_RESTARTED = load_script("redis_restarted")

REDIS_KEPT = timedelta(days=7)
"""How long it is known on which run of Redis a node last held its lease: the longest night in which all is stopped."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that runs a node, readable as it stands in redis-cli.

    Attributes:
        instance: A word that no other process has.
        host: Name of its machine.
        machine: Tells machines and containers apart: only within one of them does a pid mean anything.
        address: Where it listens.
        stopping: It was told to stop: what it still works on does not die with it.
    """

    instance: str
    host: str
    machine: str
    pid: int
    address: str
    stopping: bool = False

    def encode(self) -> str:
        """As JSON, of schema version 1, whose field `v` may be missing: releases before it was there take no more than
        the first five fields. To them, a process that stops is a holder of whom nothing is known."""  # noqa: D205, D209 - one thought
        return to_json({name: value for name, value in asdict(self).items() if value is not False}).decode()

    @classmethod
    def decode(cls, text: str) -> Holder:
        """From JSON, whose unknown fields are ignored; of a field that cannot be read nothing is known."""
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
    """The lease is ours, for its whole life from now on.

    Attributes:
        restarted: Redis was restarted since the process before this one last held it: the two may have ended together.
    """

    restarted: bool = False


@dataclass(frozen=True, slots=True)
class HeldByOther:
    """Another process has it, for `left` at least."""

    holder: Holder
    remaining: timedelta


class Leases:
    """The lease of this node, and what those of the others tell."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._life = milliseconds(settings.lease)

    async def acquire(self, holder: Holder, *, dead: str = "") -> Held | HeldByOther:
        """Take the lease of this node, or renew it.

        Args:
            holder: This process.
            dead: The instance of a holder that is known to be dead; its lease may be taken over.
        """
        keys = (self._keys.lease(self.node), self._keys.redis_run(self.node), self._keys.requests(self.node))
        lease = (holder.instance, holder.encode(), self._life, dead)
        answer = await _ACQUIRE_LEASE.run(self._redis, keys, (*lease, GROUP, self.node, milliseconds(REDIS_KEPT)))
        if answer[0] == "held":
            return Held(restarted=answer[1] == "1")
        return HeldByOther(Holder.decode(answer[1]), _span(answer[2]) or timedelta())

    async def release(self, holder: Holder) -> None:
        """Give the lease up: the node's stream may be adopted at once."""
        await _RELEASE_LEASE.run(self._redis, (self._keys.lease(self.node),), (holder.instance,))

    async def redis_restarted_since(self, node: str) -> bool:
        """Whether Redis was restarted since a node last held its lease: it may have ended when Redis did."""
        return bool(await _REDIS_RESTARTED.run(self._redis, (self._keys.redis_run(node),), ()))

    async def heartbeat(self) -> None:
        """Be seen in the directory of nodes."""
        await self._redis.execute("ZADD", self._keys.nodes(), now_ms(), self.node)

    async def other_nodes(self) -> dict[str, timedelta]:
        """The other nodes of the directory, and how long ago each was last seen. What is no node's id is ignored."""
        rows = await self._redis.execute("ZRANGE", self._keys.nodes(), 0, -1, "WITHSCORES")
        moment = now_ms()
        return {node: to_timedelta(moment - at) for node, at in rows if node != self.node and _NODE.fullmatch(node)}

    async def time_left(self, nodes: Iterable[str]) -> dict[str, timedelta | None]:
        """How long the lease of each node lasts if it is not renewed; None: nobody holds it."""
        names = list(nodes)
        asked = (self._redis.execute("PTTL", self._keys.lease(node)) for node in names)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return {node: _span(answer) for node, answer in zip(names, answers, strict=True)}


def _span(answer: int | BaseException) -> timedelta | None:
    if isinstance(answer, StoreError):  # not known: then it counts as alive
        return timedelta.max
    if isinstance(answer, BaseException):
        raise answer
    if answer == -1:  # set by hand, without an end
        return timedelta.max
    return to_timedelta(answer) if answer >= 0 else None


def _text(value: object, otherwise: str) -> str:
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_FIELD else otherwise
