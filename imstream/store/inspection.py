"""Read-only views of a node's stream and of a user, for `imstream streams` and `imstream user`."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from redis.exceptions import ResponseError

from imstream.clock import Day, now_ms, time_of, to_timedelta
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.model import Waiting
from imstream.redis.client import RedisClient, to_dict
from imstream.redis.connection import Argument
from imstream.redis.errors import error_from_reply
from imstream.store.dead_letters import Letter
from imstream.store.leases import Holder
from imstream.store.nodes import decode_states
from imstream.store.pauses import ALL, Pause
from imstream.store.replies import waiting_of
from imstream.store.scripts import LUA
from imstream.user_ids import UserId

MAX_SHOWN = 20  # requests in progress that are listed; all are counted


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A request that was admitted `since` ago.

    `deliveries`: the last one, and those before whose worker died. `waiting`: why it waits for its backend, if it does.
    """

    entry_id: str
    user: str
    message_id: str
    since: timedelta
    deliveries: int = 0
    waiting: Waiting | None = None


@dataclass(frozen=True, slots=True)
class StreamOverview:
    """The stream of one node."""

    unfinished: int
    in_progress: dict[str, int]  # number of requests by consumer
    oldest: list[Unfinished]  # the first `MAX_SHOWN` of them
    next: Unfinished | None  # the next request to be delivered
    dead: int
    newest_dead: list[Letter]
    holder: Holder | None = None  # the process that runs the node; None: none does
    adopter: str | None = None  # the node that has adopted the stream
    pause: str | None = None  # why its requests wait for an operator
    dead_nodes: tuple[str, ...] = ()  # consumers without a lease
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)  # as the node that reads the stream sees them

    @property
    def waiting(self) -> int:
        """Requests that were not delivered yet."""
        return self.unfinished - sum(self.in_progress.values())

    @property
    def slots(self) -> int:
        """Maximum requests in work at the node that reads the stream; 0: not known."""
        working = [one for one in self.backends.values() if one.get("state") != "away"] or [*self.backends.values()]
        limits: list[tuple[int, bool]] = [(one.get("slots", 0), one.get("sharesSlots", False)) for one in working]
        shared = max((limit for limit, is_shared in limits if is_shared), default=0)
        total = shared + sum(limit for limit, is_shared in limits if not is_shared)
        own: list[int | None] = [one.get("nodeSlots") for one in working]
        return min([total, *filter(None, own)])


@dataclass(frozen=True, slots=True)
class UserOverview:
    """The keys of one user. `account`: the fields of a ban or lock, possibly expired.

    `counted`: the messages of `day`, newest first, and when each was asked (ms since 1970).
    """

    account: dict[str, str]
    day: str
    counted: list[tuple[str, float]]
    violations: int
    violations_expire_in: timedelta
    nodes: list[str]


async def inspect_user(redis: RedisClient, keys: Keys, user_id: UserId, day: Day) -> UserOverview:
    """Inspect a user. Raises as `inspect_stream` does."""
    account, counted, violations, expiry, nodes = await asyncio.gather(
        _read(redis, "HGETALL", keys.account(user_id)),
        _read(redis, "ZREVRANGE", keys.quota(user_id, day.name), 0, -1, "WITHSCORES"),
        _read(redis, "GET", keys.violations(user_id)),
        _read(redis, "PTTL", keys.violations(user_id)),
        _read(redis, "SMEMBERS", keys.route(user_id)),
    )
    if violations is not None and not violations.isdecimal():
        raise StoreRefused(f"{keys.violations(user_id)}: {violations!r} is not a number")
    return UserOverview(
        account=to_dict(account),
        day=day.name,
        counted=[(message_id, float(at)) for message_id, at in counted],
        violations=int(violations or 0),
        violations_expire_in=timedelta(milliseconds=max(0, expiry)),
        nodes=sorted(nodes),
    )


async def is_node(redis: RedisClient, keys: Keys, node: str) -> bool:
    """Whether a node has run, or has left requests or dead letters. Raises `StoreError`."""
    listed, found = await asyncio.gather(
        redis.execute("ZSCORE", keys.nodes(), node),
        redis.execute("EXISTS", keys.lease(node), keys.requests(node), keys.dead(node)),
    )
    return listed is not None or bool(found)


async def inspect_stream(redis: RedisClient, keys: Keys, node: str, *, newest: int) -> StreamOverview:
    """Inspect the stream of a node and its `newest` dead letters. `StoreRefused` names a key written by hand."""
    stream, dead = keys.requests(node), keys.dead(node)
    length, dead_length, letters, lease, adopter, pauses, (in_progress, oldest, following) = await asyncio.gather(
        _read(redis, "XLEN", stream),
        _read(redis, "XLEN", dead),
        _read(redis, "XREVRANGE", dead, "+", "-", "COUNT", newest),
        _read(redis, "GET", keys.lease(node)),
        _read(redis, "GET", keys.adopter(node)),
        _read(redis, "HMGET", keys.paused(), ALL, node),
        _unfinished(redis, keys, stream),
    )
    reader = node if lease is not None else adopter or node
    states, *leases = await asyncio.gather(
        _read(redis, "HGETALL", keys.backends(reader)),
        *(_read(redis, "EXISTS", keys.lease(consumer)) for consumer in in_progress),
    )
    return StreamOverview(
        unfinished=length,
        in_progress=in_progress,
        oldest=oldest,
        next=following,
        dead=dead_length,
        newest_dead=[Letter(node, entry_id, to_dict(flat)) for entry_id, flat in letters or ()],
        holder=None if lease is None else Holder.decode(lease),
        adopter=adopter,
        pause=next((Pause.decode(text).about for text in pauses if text is not None), None),
        dead_nodes=tuple(consumer for consumer, exists in zip(in_progress, leases, strict=True) if not exists),
        backends=decode_states(states),
    )


async def failing_commands(redis: RedisClient, keys: Keys, node: str) -> dict[str, list[str]]:
    """The commands of a node that Redis denies or does not carry out now, by error. Raises `StoreError`."""
    answer = await LUA["check_rights"].run(redis, (keys.probe(node),), ())
    failing: dict[str, list[str]] = {}
    for command, text in to_dict(answer).items():
        error = error_from_reply(ResponseError(text))
        if not isinstance(error, StoreRefused):  # else it lacks the result of a denied command
            failing.setdefault(str(error), []).append(command)
    return failing


async def _read(redis: RedisClient, command: str, key: str, *rest: Argument) -> Any:  # noqa: ANN401 - what Redis answers
    try:
        return await redis.execute(command, key, *rest)
    except StoreRefused as refused:
        raise StoreRefused(f"{key}: {refused}") from None


async def _unfinished(
    redis: RedisClient, keys: Keys, stream: str
) -> tuple[dict[str, int], list[Unfinished], Unfinished | None]:
    """The number of requests in work by consumer, the oldest of them, and the next request to be delivered."""
    summary: list[Any] = []
    counts, rows, after = dict[str, int](), list[Any](), "-"
    with suppress(StoreRefused):  # no such stream or group
        summary, rows = await asyncio.gather(
            redis.execute("XPENDING", stream, GROUP),
            redis.execute("XPENDING", stream, GROUP, "-", "+", MAX_SHOWN),
        )
        counts = {consumer: int(count) for consumer, count in summary[3] or ()}
        after = f"({summary[2]}" if summary[2] else "-"  # entries are delivered in their order
    waiting, *found = await asyncio.gather(
        _read(redis, "XRANGE", stream, after, "+", "COUNT", 1),
        *(redis.execute("XRANGE", stream, row[0], row[0]) for row in rows),
    )
    oldest = [_describe(row[0], entries) for row, entries in zip(rows, found, strict=True)]
    records = await asyncio.gather(
        *(_read(redis, "XREVRANGE", keys.reply(one.user, one.message_id), "+", "-", "COUNT", 1) for one in oldest)
    )
    shown = [
        replace(one, deliveries=row[3], waiting=waiting_of(to_dict(record[0][1])) if record else None)
        for one, row, record in zip(oldest, rows, records, strict=True)
    ]
    return counts, shown, _describe(waiting[0][0], waiting) if waiting else None


def _describe(entry_id: str, entries: list[Any]) -> Unfinished:
    fields = to_dict(entries[0][1]) if entries else {}
    age = to_timedelta(max(0, now_ms() - time_of(entry_id)))
    return Unfinished(entry_id, fields.get("user", "?"), fields.get("message_id", "?"), age)
