"""The requests stream of one node: admit, read by consumer group, finish or bury (I2, I3)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from imstream.clock import milliseconds, now_ms
from imstream.errors import StoreError, StoreRefused
from imstream.keys import GROUP, Keys
from imstream.metrics import Metrics, reason_label
from imstream.model import ChatRequest
from imstream.redis.client import BlockingReader, RedisClient, entries_of, to_dict
from imstream.redis.connection import Argument
from imstream.settings import Settings
from imstream.store.dead_letters import DeadLetterBounds
from imstream.store.replies import Opening
from imstream.store.scripts import LUA, Step, run_both

MAX_PENDING_LISTED = 100_000  # as in `acquire_lease`; one node has no more in work


class GroupMissing(Exception):  # noqa: N818 - a state of the stream, not a fault of the caller
    """The stream or its consumer group is gone: it was deleted or flushed, or Redis has lost its data."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request is in the stream."""

    entry_id: str
    position: int  # how many wait for a worker, this one included
    opened: Opening | None = None  # how its reply was opened, when it is delivered to the worker already


@dataclass(frozen=True, slots=True)
class QueueFull:
    """A request did not fit. `by_user`: the user's own cap was reached, not the node's."""

    by_user: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry delivered to a worker. `deliveries`: this one, and those before it whose worker died."""

    entry_id: str
    fields: dict[str, str]
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """An entry delivered to the worker of node `consumer` and not finished."""

    entry_id: str
    deliveries: int
    consumer: str


class RequestStream:
    """The requests stream of `node`, for the worker of node `consumer`: the same node, or one that has adopted it."""

    def __init__(
        self,
        redis: RedisClient,
        reader: BlockingReader,
        settings: Settings,
        *,
        node: str | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.consumer = settings.node
        self.node = settings.node if node is None else node
        keys = self._all_keys = Keys(settings.key_prefix)
        self._metrics = metrics or Metrics()
        self._state = self._metrics.stream(self.node)
        self._redis = redis
        self._reader = reader
        self._limits = (settings.queue_limit, settings.user_limit)
        self.key = keys.requests(self.node)  # the key of the stream
        self._keys = (self.key, keys.load(self.node))
        self._lease = keys.lease(self.node)
        self._dead = keys.dead(self.node)
        self._dead_age = milliseconds(settings.dead_age)
        self._dead_letters = DeadLetterBounds(redis, settings, count_dropped=self._metrics.dead_letters_dropped.inc)

    @property
    def is_own(self) -> bool:
        """Whether the consumer is the node of the stream."""
        return self.consumer == self.node

    @property
    def shares_server(self) -> bool:
        """Whether its keys are on the server of all others, so that one script may use both: not in a cluster."""
        return not self._redis.is_split

    async def admit(self, request: ChatRequest) -> Admitted | QueueFull:
        """Append a request unless the node's or the user's cap is reached."""
        return await self._admission(request).run(self._redis)

    async def begin(self, request: ChatRequest, opening: Step[Opening]) -> Admitted | QueueFull:
        """Append a request, and begin it at once if no other one waits for a worker. Not in a cluster.

        `opening`: that of its reply, for the request id without an entry id.
        """
        step = self._admission(request)
        admitted, opened = await run_both("begin", self._redis, step, opening, self.consumer)
        return replace(admitted, opened=opened) if isinstance(admitted, Admitted) else admitted

    def _admission(self, request: ChatRequest) -> Step[Admitted | QueueFull]:
        arguments: tuple[Argument, ...] = (*self._limits, GROUP, str(request.user_id), *request.fields())
        return Step("admit", self._keys, arguments, self._admitted)

    def _admitted(self, answer: Sequence[Any]) -> Admitted | QueueFull:
        verdict, *rest = answer
        if verdict != "admitted":
            return QueueFull(by_user=verdict == "user_full")
        self._state.admitted(rest[0], int(rest[2]))
        return Admitted(rest[0], int(rest[1]))

    async def ensure_group(self) -> bool:
        """Create the consumer group if it is missing, and recount the users' requests. True when it was created."""
        return bool(await LUA["ensure_group"].run(self._redis, self._keys, (GROUP,)))

    async def read(self, *, count: int, block: timedelta | None) -> list[Entry]:
        """Read at most `count` new entries; wait up to `block` for the first, if given.

        Never cancel this: entries that Redis is delivering would stay pending, unseen. Raises `GroupMissing`, also when
        the stream is deleted while waiting.
        """
        command = ("XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count)
        streams = ("STREAMS", self.key, ">")
        with _detecting_missing_group():
            if block is None:
                answer = await self._redis.execute(*command, *streams)
            else:
                answer = await self._reader.execute(*command, "BLOCK", milliseconds(block), *streams)
        return [Entry(entry_id, to_dict(fields)) for entry_id, fields in entries_of(answer) if fields is not None]

    async def other_consumers(self) -> dict[str, int]:
        """The other consumers, and how many entries are pending for each. Raises `GroupMissing`."""
        with _detecting_missing_group():
            rows = await self._redis.execute("XINFO", "CONSUMERS", self.key, GROUP)
        return {row["name"]: int(row["pending"]) for row in rows if row["name"] != self.consumer}

    async def remove_consumer(self, consumer: str) -> None:
        """Remove a consumer from the group, unless it has pending entries."""
        await LUA["remove_consumer"].run(self._redis, (self.key,), (GROUP, consumer))

    async def pending(self, consumer: str | None = None, *, exclude: Iterable[str] = ()) -> list[PendingEntry]:
        """Pending entries of a consumer (by default ours), oldest first, except the excluded. Raises `GroupMissing`."""
        excluded, consumer = set(exclude), consumer or self.consumer
        with _detecting_missing_group():
            rows = await self._redis.execute("XPENDING", self.key, GROUP, "-", "+", MAX_PENDING_LISTED, consumer)
        return [PendingEntry(row[0], int(row[3]), consumer) for row in rows if row[0] not in excluded]

    async def claim(self, entry: PendingEntry, *, deliveries: int, to: str | None = None) -> Entry | None:
        """Claim a pending entry, for us or for the consumer `to`, and set its delivery count.

        None when it has ended or changed its consumer, or when the node of its consumer is alive again (I7).
        """
        needs_lease = int(entry.consumer == self.node and not self.is_own)
        arguments = (GROUP, to or self.consumer, entry.consumer, entry.entry_id, deliveries, needs_lease, 0)
        fields = await LUA["claim"].run(self._redis, (self.key, self._lease), arguments)
        return None if fields is None else Entry(entry.entry_id, to_dict(fields), deliveries)

    async def is_taken_over(self, entry: Entry) -> bool:
        """Whether an entry that was delivered to us has another consumer now. False when Redis has lost it."""
        try:
            with _detecting_missing_group():
                rows = await self._redis.execute("XPENDING", self.key, GROUP, entry.entry_id, entry.entry_id, 1)
        except GroupMissing:
            return False
        return bool(rows) and rows[0][1] != self.consumer

    async def hand_back(self, entry: Entry, *, to: str | None = None) -> None:
        """Do not count our delivery of an entry: the worker stops, and did not die of it. Idempotent.

        Nothing happens when the entry has another consumer. `to`: the consumer that has it from now on.
        """
        arguments = (GROUP, to or self.consumer, self.consumer, entry.entry_id, entry.deliveries - 1, 0, 1)
        await LUA["claim"].run(self._redis, (self.key, self._lease), arguments)

    async def unfinished(self) -> int:
        """The number of requests in the stream."""
        return int(await self._redis.execute("XLEN", self.key))

    async def ping(self) -> None:
        """Check that the server that has the stream answers."""
        await self._redis.execute("EXISTS", self.key)

    def request_id(self, entry_id: str) -> str:
        """The id of a request in records of replies."""
        return f"{self.node}/{entry_id}"

    async def is_unfinished(self, request: str) -> bool:
        """Whether a request, given by its id in records, is in the stream of its node."""
        node, _, entry_id = request.rpartition("/")
        return bool(await self._redis.execute("XRANGE", self._all_keys.requests(node), entry_id, entry_id))

    def removal(self, entry: Entry) -> Step[bool]:
        """The step of `finish`."""

        def removed(answer: Sequence[Any]) -> bool:
            self._state.ended(entry.entry_id, int(answer[1]))
            return bool(answer[0])

        return Step("finish", self._keys, (GROUP, entry.entry_id, entry.fields.get("user", "")), removed)

    async def finish(self, entry: Entry) -> bool:
        """Acknowledge and delete a request whose terminal event is recorded. False: it was not there."""
        # Not urgent: no caller waits for the reply, and a request admitted meanwhile is sent behind it, so it fits.
        return await self.removal(entry).run(self._redis, urgent=False)

    async def bury(self, entry: Entry, *, reason: str, error: str, attempts: int) -> bool:
        """Move a request to the dead stream. `reason` is a word for programs, `error` a line for an operator.

        False: it was not there.
        """
        added = ("reason", reason, "error", error, "attempts", attempts, "dead_at", now_ms())
        arguments = (GROUP, entry.entry_id, entry.fields.get("user", ""), self._dead_age, *added)
        was_there, left = await LUA["bury"].run(self._redis, (*self._keys, self._dead), arguments)
        self._state.ended(entry.entry_id, int(left))
        if was_there:  # else an earlier try was executed, and its answer lost
            self._metrics.dead_letters[reason_label(reason)] += 1
        return bool(was_there)

    async def trim_dead(self) -> None:
        """Drop the oldest dead letters beyond their bounds (I9). Errors are ignored: requests continue."""
        with suppress(StoreError):
            await self._dead_letters.trim(self.node)


@contextmanager
def _detecting_missing_group() -> Iterator[None]:
    """Raise `GroupMissing` for NOGROUP, and for UNBLOCKED: the key was deleted under a blocked read (Redis 7.0)."""
    try:
        yield
    except StoreRefused as error:
        if str(error).startswith(("NOGROUP", "UNBLOCKED", "no such key")):  # the last is from XINFO
            raise GroupMissing(str(error)) from error
        raise
