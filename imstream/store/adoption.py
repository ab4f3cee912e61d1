"""Streams whose node is dead: looked after by one living node until the node is back or nothing is left (I1, I7)."""

from __future__ import annotations

from dataclasses import dataclass

from imstream.clock import milliseconds
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

_ADOPT = load_script("adopt")
_RELEASE_STREAM = load_script("release_stream")
_RETIRE = load_script("retire")


@dataclass(frozen=True, slots=True)
class Adopted:
    """We look after the stream. `unfinished`: requests in it."""

    unfinished: int


@dataclass(frozen=True, slots=True)
class NotAdopted:
    """The node is alive, or another one looks after its stream: `adopter` that one, None when the node is alive."""

    adopter: str | None


class Adoption:
    """What one node does about the streams of others."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._life = milliseconds(settings.lease)

    async def unfinished(self, node: str) -> int:
        """Requests in the stream of a node."""
        count: int = await self._redis.execute("XLEN", self._keys.requests(node))
        return count

    async def adopt(self, node: str) -> Adopted | NotAdopted:
        """Adopt the stream of a node for as long as a lease lasts, or go on doing so."""
        keys = (self._keys.lease(node), self._keys.adopter(node), self._keys.requests(node))
        verdict, *rest = await _ADOPT.run(self._redis, keys, (self.node, self._life))
        if verdict == "adopted":
            return Adopted(int(rest[0]))
        return NotAdopted(rest[0] if rest else None)

    async def has_pending(self, node: str) -> bool:
        """Whether requests of a node are pending under our name."""
        try:
            rows = await self._redis.execute("XPENDING", self._keys.requests(node), GROUP, "-", "+", 1, self.node)
        except StoreRefused as refused:
            if str(refused).startswith("NOGROUP"):
                return False
            raise
        return bool(rows)

    async def release_stream(self, node: str) -> bool:
        """Adopt it no longer. False when requests of it are still pending under our name."""
        keys = (self._keys.adopter(node), self._keys.requests(node))
        return int(await _RELEASE_STREAM.run(self._redis, keys, (self.node, GROUP))) == 0

    async def retire(self, node: str) -> bool:
        """Forget a node that is gone for good; False when it is not, or has requests left."""
        keys = self._keys
        of_node = (keys.lease, keys.adopter, keys.requests, keys.load, keys.inbox, keys.redis_run)
        if not await _RETIRE.run(self._redis, [key(node) for key in of_node], ()):
            return False
        await self._redis.execute("ZREM", keys.nodes(), node)
        return True
