"""The requests stream of one node: admitted, read by its consumer group, finished or buried (I2, I3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from imstream.clock import milliseconds, now_ms
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.model import ChatRequest
from imstream.redis.client import Argument, BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

MAX_DEAD_LETTERS = 10_000
MAX_PENDING_LISTED = 1_000

_ADMIT = load_script("admit")
_FINISH = load_script("finish")
_BURY = load_script("bury")
_ENSURE_GROUP = load_script("ensure_group")
_CLAIM = load_script("claim")
_REMOVE_CONSUMER = load_script("remove_consumer")
_HAND_BACK = load_script("hand_back")


class GroupMissing(Exception):  # noqa: N818 - a state of the stream, not a fault of the caller
    """The stream or its consumer group has gone: somebody deleted or flushed it, or Redis came back without data."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request is in the stream. `position`: how many wait for a worker up to and including it."""

    entry_id: str
    position: int


@dataclass(frozen=True, slots=True)
class QueueFull:
    """A request did not fit. `by_user`: the user's own cap was reached, not the node's."""

    by_user: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry given to a worker.

    Attributes:
        deliveries: How often it was given to a worker that then died with it, this time included.
    """

    entry_id: str
    fields: dict[str, str]
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """One entry that was given to a worker and is not finished. `consumer`: that worker's node."""

    entry_id: str
    deliveries: int
    consumer: str


class RequestStream:
    """The requests stream of one node, as one worker sees it: that node's own, or another's who adopted it.

    Attributes:
        node: The node whose stream it is.
        consumer: The node that works on it.
    """

    def __init__(
        self, redis: RedisClient, reader: BlockingReader, settings: Settings, *, node: str | None = None
    ) -> None:
        self.consumer = settings.node
        self.node = settings.node if node is None else node
        keys = self._all_keys = Keys(settings.key_prefix)
        self._redis = redis
        self._reader = reader
        self._limits = (settings.queue_limit, settings.user_limit)
        self._stream = keys.requests(self.node)
        self._keys = (self._stream, keys.load(self.node))
        self._lease = keys.lease(self.node)
        self._dead = keys.dead(self.node)

    @property
    def is_own(self) -> bool:
        """Whether it is the stream of the node that works on it."""
        return self.consumer == self.node

    async def admit(self, request: ChatRequest) -> Admitted | QueueFull:
        """Append a request unless the node's or the user's cap is reached."""
        arguments: tuple[Argument, ...] = (*self._limits, GROUP, str(request.user_id), *request.fields())
        verdict, *rest = await _ADMIT.run(self._redis, self._keys, arguments)
        if verdict == "admitted":
            return Admitted(rest[0], int(rest[1]))
        return QueueFull(by_user=verdict == "user_full")

    async def ensure_group(self) -> bool:
        """Make the consumer group if need be and count the users' requests anew; True when it had to be made."""
        return bool(await _ENSURE_GROUP.run(self._redis, self._keys, (GROUP,)))

    async def read(self, *, count: int, block: timedelta | None) -> list[Entry]:
        """Take requests never given to a worker, at most `count`; wait for the first up to `block`, if given.

        Never cancel this: what was on its way would be pending and unseen.

        Raises:
            GroupMissing: There is no such consumer group, or the stream went away while waiting.
        """
        command = ("XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count)
        which = ("STREAMS", self._stream, ">")
        with _naming_a_missing_group():
            if block is None:
                answer = await self._redis.execute(*command, *which)
            else:
                answer = await self._reader.execute(*command, "BLOCK", milliseconds(block), *which)
        return [entry for entry in _entries(answer) if entry is not None]

    async def other_consumers(self) -> dict[str, int]:
        """The other nodes that ever took from the stream, and how many requests each has not finished.

        Raises:
            GroupMissing: There is no such consumer group.
        """
        with _naming_a_missing_group():
            rows = await self._redis.execute("XINFO", "CONSUMERS", self._stream, GROUP)
        return {row["name"]: int(row["pending"]) for row in rows if row["name"] != self.consumer}

    async def remove_consumer(self, consumer: str) -> None:
        """Take a node that is gone out of the group, unless it has requests that are not finished."""
        await _REMOVE_CONSUMER.run(self._redis, (self._stream,), (GROUP, consumer))

    async def pending(self, consumer: str | None = None, *, exclude: Iterable[str] = ()) -> list[PendingEntry]:
        """What was given to a node and is not finished, oldest first, without the entries named in `exclude`.

        Args:
            consumer: The node; the one that works on the stream, unless given.
            exclude: Entry ids.

        Raises:
            GroupMissing: There is no such consumer group.
        """
        known, consumer = set(exclude), consumer or self.consumer
        with _naming_a_missing_group():
            rows = await self._redis.execute("XPENDING", self._stream, GROUP, "-", "+", MAX_PENDING_LISTED, consumer)
        return [PendingEntry(row[0], int(row[3]), consumer) for row in rows if row[0] not in known]

    async def claim(self, entry: PendingEntry, *, deliveries: int) -> Entry | None:
        """Take up a pending entry, and note how often it was given to a worker.

        None when it is no longer there, or was given to somebody else meanwhile, or its node is alive again (I7).
        """
        needs_lease = int(entry.consumer == self.node and not self.is_own)
        fields = await _CLAIM.run(
            self._redis,
            (self._stream, self._lease),
            (GROUP, self.consumer, entry.consumer, entry.entry_id, deliveries, needs_lease),
        )
        return None if fields is None else Entry(entry.entry_id, _pairs(fields), deliveries)

    async def is_taken_over(self, entry: Entry) -> bool:
        """Whether an entry that was given to us is another node's by now. One that Redis has lost is nobody's."""
        try:
            with _naming_a_missing_group():
                rows = await self._redis.execute("XPENDING", self._stream, GROUP, entry.entry_id, entry.entry_id, 1)
        except GroupMissing:
            return False
        return bool(rows) and rows[0][1] != self.consumer

    async def hand_back(self, entry: Entry, *, to: str | None = None) -> None:
        """Note that an entry does not die with its worker, whenever that ends: it was told to stop. May be repeated.

        Args:
            entry: One that was given to us. When it is another node's by now, nothing is noted.
            to: The node under whose name it is pending from now on, instead of ours.
        """
        arguments = (GROUP, self.consumer, entry.entry_id, entry.deliveries - 1, to or self.consumer)
        await _HAND_BACK.run(self._redis, (self._stream,), arguments)

    async def unfinished(self) -> int:
        """Requests in the stream."""
        count: int = await self._redis.execute("XLEN", self._stream)
        return count

    async def ping(self) -> None:
        """Ask the server that has the stream for a sign of life."""
        await self._redis.execute("EXISTS", self._stream)

    async def is_unfinished(self, request: str) -> bool:
        """Whether a request, as `node/entry id`, is in the stream of its node."""
        node, _, entry_id = request.rpartition("/")
        return bool(await self._redis.execute("XRANGE", self._all_keys.requests(node), entry_id, entry_id))

    async def finish(self, entry: Entry) -> None:
        """Acknowledge and delete a request whose terminal event is recorded."""
        arguments = (GROUP, entry.entry_id, entry.fields.get("user", ""))
        # Nobody waits for it; and a request admitted meanwhile travels behind it, and finds its place free.
        await _FINISH.run(self._redis, self._keys, arguments, urgent=False)

    async def bury(self, entry: Entry, *, reason: str, error: str, attempts: int) -> None:
        """Move a request to the dead stream. `reason` is a word for programs, `error` a line for an operator."""
        await _BURY.run(
            self._redis,
            (*self._keys, self._dead),
            (
                *(GROUP, entry.entry_id, entry.fields.get("user", ""), MAX_DEAD_LETTERS),
                *("reason", reason, "error", error, "attempts", attempts, "dead_at", now_ms()),
            ),
        )


def _entries(answer: Any) -> list[Entry | None]:  # noqa: ANN401 - what Redis answers
    streams = answer.items() if isinstance(answer, dict) else answer or ()
    return [Entry(row[0], _pairs(row[1])) if row[1] is not None else None for _, rows in streams for row in rows]


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


@contextmanager
def _naming_a_missing_group() -> Iterator[None]:
    """Raise `GroupMissing` for NOGROUP, and for UNBLOCKED: the key was deleted under a blocked read (Redis 7.0)."""
    try:
        yield
    except StoreRefused as refused:
        # The last is how XINFO says it.
        if str(refused).startswith(("NOGROUP", "UNBLOCKED", "no such key")):
            raise GroupMissing(str(refused)) from refused
        raise
