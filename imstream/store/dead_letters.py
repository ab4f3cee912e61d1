"""Dead letters: bounded in number, age and bytes (I9), and moved back or deleted by operators."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

import structlog

from imstream.clock import milliseconds, now_ms, time_of
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.model import RETRIED_VERSION
from imstream.redis.client import RedisClient, to_dict
from imstream.settings import Settings
from imstream.store.nodes import inspect_nodes
from imstream.store.scripts import LUA

MAX_DEAD_LETTERS = 10_000

_PAGE = 100
_FRUITLESS_PAUSE = 1.0  # seconds in which memory is not searched for dead letters again after there were none
_SCAN_PAUSE = 60.0  # seconds until keys are scanned again for dead letters: it takes Redis half a second for a million

Outcome = Literal["retried", "unknown", "node_full", "user_full"]


log = structlog.get_logger()


class DeadLetterBounds:
    """Keeps the dead letters of nodes within their bounds."""

    def __init__(
        self, redis: RedisClient, settings: Settings, *, count_dropped: Callable[[int], object] = lambda _: None
    ) -> None:
        self._count_dropped = count_dropped
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._node = settings.node
        self._bounds = (MAX_DEAD_LETTERS, milliseconds(settings.dead_age))
        self._bytes = settings.dead_bytes
        self._lock = asyncio.Lock()
        self._searches = 0
        self._made_room = False
        self._search_again_at = self._scan_again_at = 0.0
        self._gone = set[str]()  # nodes that are not in the directory, and have dead letters

    async def trim(self, node: str, *, halve: bool = False) -> int:
        """Drop the oldest letters of a node beyond the bounds; with `halve`, as many as take half of the memory."""
        arguments = (*self._bounds, "" if halve else self._bytes)
        dropped = int(await LUA["trim_dead"].run(self._redis, (self._keys.dead(node),), arguments))
        self._count_dropped(dropped)
        return dropped

    async def make_room(self) -> bool:
        """Drop dead letters because Redis is out of memory; whether any were dropped. Concurrent calls are one."""
        searches = self._searches
        async with self._lock:
            if searches == self._searches and time.monotonic() >= self._search_again_at:
                self._made_room = await self._halve_all() > 0
                self._searches += 1
                if self._made_room:
                    log.warning("dead letters dropped: redis is out of memory")
                else:
                    self._search_again_at = time.monotonic() + _FRUITLESS_PAUSE
            return self._made_room

    async def _halve_all(self) -> int:
        dropped = 0
        with suppress(StoreError):  # the letters dropped until then may be enough
            dropped = await self.trim(self._node, halve=True)
            if self._redis.topology == "cluster":  # others are probably on a server that has memory
                return dropped
            nodes = await self._redis.execute("ZRANGE", self._keys.nodes(), 0, -1)
            dropped += sum([await self.trim(node, halve=True) for node in {*nodes, *self._gone} - {self._node}])
            if dropped == 0 and time.monotonic() >= self._scan_again_at:
                self._scan_again_at = time.monotonic() + _SCAN_PAUSE
                self._gone = await find_nodes(self._redis, self._keys) - {*nodes}
                dropped = sum([await self.trim(node, halve=True) for node in self._gone])
        return dropped


async def find_nodes(redis: RedisClient, keys: Keys) -> set[str]:
    """The nodes that have dead letters, also those that have left the directory."""
    return {*filter(None, map(keys.node_of_dead, await redis.scan(keys.dead("*"))))}


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter of a node, with all fields of its entry."""

    node: str
    entry_id: str
    fields: dict[str, str]

    @property
    def dead_at(self) -> datetime:
        """When it was buried."""
        at = self.fields.get("dead_at", "")
        return datetime.fromtimestamp((int(at) if at.isdecimal() else time_of(self.entry_id)) / 1000, UTC)

    @property
    def about(self) -> dict[str, str]:
        """The fields that are listed; `?` for those that an entry written by hand lacks."""
        return {name: self.fields.get(name, "?") for name in ("user", "message_id", "reason", "error", "attempts")}


class Selection(NamedTuple):
    """The selected letters; an empty field selects all. `since`: buried at most so long ago."""

    ids: tuple[str, ...] = ()
    reason: str | None = None
    user: str | None = None
    since: timedelta | None = None

    def has(self, letter: Letter) -> bool:
        """Whether a letter is meant; `since` is not checked."""
        wanted = {"reason": self.reason, "user": self.user}
        is_meant = all(value is None or letter.fields.get(name) == value for name, value in wanted.items())
        return is_meant and (not self.ids or letter.entry_id in self.ids)


class DeadLetterOffice:
    """The dead letters of all nodes, for operators."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._settings = settings
        self._limits: dict[str, tuple[int, int]] = {}

    async def nodes(self) -> list[str]:
        """The nodes of the directory, and those that have left it and have dead letters."""
        listed: list[str] = await self._redis.execute("ZRANGE", self._keys.nodes(), 0, -1)
        return sorted(await find_nodes(self._redis, self._keys) | {*listed})

    async def older_nodes(self) -> list[str]:
        """The living nodes of a release that would delete a retried request, because its reply has ended."""
        nodes = await inspect_nodes(self._redis, self._keys)
        return [one.node for one in nodes if one.state != "dead" and (one.reads or 1) < RETRIED_VERSION]

    async def letters(self, node: str, selection: Selection, *, newest_first: bool = False) -> AsyncGenerator[Letter]:
        """The selected letters of a node."""
        oldest = "-" if selection.since is None else str(max(0, now_ms() - milliseconds(selection.since)))
        ends = ["+", oldest] if newest_first else [oldest, "+"]
        command = "XREVRANGE" if newest_first else "XRANGE"
        while rows := await self._redis.execute(command, self._keys.dead(node), *ends, "COUNT", _PAGE):
            for entry_id, flat in rows:
                if selection.has(letter := Letter(node, entry_id, to_dict(flat))):
                    yield letter
            ends[0] = f"({rows[-1][0]}"

    async def retry(self, letter: Letter) -> Outcome:
        """Move a letter back to the requests of its node. Repeated, it is `unknown`."""
        # A node that has left the directory is listed again, before and after: others adopt its stream. It counts as
        # seen now, as it may be about to be removed from the directory.
        listing = ("ZADD", self._keys.nodes(), "GT", now_ms(), letter.node)
        await self._redis.execute(*listing)
        keys = (self._keys.requests(letter.node), self._keys.load(letter.node), self._keys.dead(letter.node))
        limits = await self._limits_of(letter.node)
        verdict: Outcome = (await LUA["retry"].run(self._redis, keys, (*limits, letter.entry_id)))[0]
        await self._redis.execute(*listing)
        return verdict

    async def _limits_of(self, node: str) -> tuple[int, int]:
        """The caps of a node and of its users, as it has published them; else those of our own settings."""
        if node not in self._limits:
            told = await self._redis.execute("HMGET", self._keys.status(node), "queue_limit", "user_limit")
            ours = (self._settings.queue_limit, self._settings.user_limit)
            queue, user = (int(text) if text else limit for text, limit in zip(told, ours, strict=True))
            self._limits[node] = (queue, user)
        return self._limits[node]

    async def has_reply(self, letter: Letter) -> bool:
        """Whether the reply to a letter is kept, in which its user's clients may see the answer."""
        key = self._keys.reply(letter.fields.get("user", ""), letter.fields.get("message_id", ""))
        return bool(await self._redis.execute("EXISTS", key))

    async def purge(self, letter: Letter) -> bool:
        """Delete a letter. False when it was not there."""
        return bool(await self._redis.execute("XDEL", self._keys.dead(letter.node), letter.entry_id))
