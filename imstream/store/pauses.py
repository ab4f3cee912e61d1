"""Pauses: an operator has the requests of one node, or of all, wait. Kept in Redis, so a restart does not end them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any, Self

from pydantic_core import from_json, to_json

from imstream.clock import now_ms
from imstream.errors import StoreRefused
from imstream.keys import Keys
from imstream.redis.client import RedisClient, to_dict
from imstream.settings import Settings

ALL = "*"  # the field of a pause of all nodes, also of those that start later; it is no node id
_MAX_TEXT = 256  # characters of a reason


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause. `by`: the operator; `at`: when (ms since 1970, 0: unknown).

    `refuses`: new messages are refused with BUSY, instead of accepted.
    """

    reason: str = ""
    by: str = ""
    at: int = 0
    refuses: bool = False

    @property
    def about(self) -> str:
        """The reason and the operator, for people."""
        return ", ".join(filter(None, [self.reason, self.by and f"by {self.by}"])) or "no reason given"

    def encode(self) -> str:
        """As JSON of schema version 1, without its optional field `v`."""
        return to_json({"reason": self.reason, "by": self.by, "at": self.at, "refuses": self.refuses}).decode()

    @classmethod
    def decode(cls, text: str) -> Self:
        """From JSON; unknown fields are ignored, and invalid ones replaced. Any other text is a reason set by hand."""
        try:
            fields: Any = from_json(text)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            return cls(_text(text))
        at = fields.get("at")
        return cls(
            _text(fields.get("reason")),
            _text(fields.get("by")),
            at if type(at) is int else 0,
            fields.get("refuses") is True,
        )


_UNKNOWN = Pause("the pauses of this node have not been read yet")


class Pauses:
    """Reads and changes pauses, and keeps the result of the last read."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._key = Keys(settings.key_prefix).paused()
        self._known: Mapping[str, Pause] | None = None
        self._ended = dict[str, float]()  # when pauses were found ended, by the monotonic clock

    @property
    def is_known(self) -> bool:
        """Whether Redis has answered."""
        return self._known is not None

    def of(self, stream: str) -> Pause | None:
        """The pause that keeps this node from starting requests of a stream; None if it may.

        All nodes, this one, or the node of the stream may be paused: requests wait wherever their stream is read.
        """
        if self._known is None:
            return _UNKNOWN
        if not self._known:
            return None
        return self._known.get(ALL) or self._known.get(self.node) or self._known.get(stream)

    @property
    def own(self) -> Pause | None:
        """The pause of this node."""
        return self.of(self.node)

    def since_end(self, stream: str) -> timedelta | None:
        """How long ago the last pause of a stream ended, as far as this process has seen one."""
        ended = [self._ended[name] for name in (ALL, self.node, stream) if name in self._ended]
        return timedelta(seconds=monotonic() - max(ended)) if ended else None

    async def read(self) -> Mapping[str, Pause]:
        """All pauses, by node. Raises `StoreError`; another type than a hash counts as none until there was one."""
        try:
            fields = await self._redis.execute("HGETALL", self._key)
        except StoreRefused:
            self._known = self._known or {}
            raise
        known = {node: Pause.decode(text) for node, text in to_dict(fields).items()}
        before, self._known = self._known or {}, known
        self._ended.update((node, monotonic()) for node in before if node not in self._known)
        return self._known

    async def pause(self, node: str, *, reason: str, by: str, refuses: bool) -> None:
        """Pause a node, or `ALL`; a pause before is replaced."""
        await self._redis.execute("HSET", self._key, node, Pause(reason, by, now_ms(), refuses).encode())

    async def resume(self, node: str) -> bool:
        """End the pause of a node, or with `ALL` every pause. Whether there was one."""
        command = ("DEL", self._key) if node == ALL else ("HDEL", self._key, node)
        return bool(await self._redis.execute(*command))


def _text(value: object) -> str:
    return "".join(one for one in value[:_MAX_TEXT] if one.isprintable()) if isinstance(value, str) else ""
