"""Read-only views of a node's stream and of a user, for `imstream streams` and `imstream user`."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from redis.exceptions import ResponseError

from imstream.clock import Day, to_timedelta
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.redis.client import RedisClient, to_dict
from imstream.redis.connection import Argument
from imstream.redis.errors import error_from_reply
from imstream.store.nodes import entry_time, redis_now
from imstream.store.scripts import LUA
from imstream.user_ids import UserId

MAX_SHOWN = 20  # requests in progress that are listed; all are counted


@dataclass(frozen=True, slots=True)
class InProgress:
    """A request that a consumer works on. `deliveries`: this one, and those before whose worker died.

    `age`: since it was admitted. `since`: since it was delivered to this consumer.
    """

    entry_id: str
    consumer: str
    age: timedelta
    since: timedelta
    deliveries: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that was given up."""

    entry_id: str
    dead_at: datetime
    user: str
    message_id: str
    attempts: str
    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class StreamOverview:
    """The stream of one node. `in_progress`: requests by consumer; the first `MAX_SHOWN` of them are the `oldest`."""

    unfinished: int
    in_progress: dict[str, int]
    oldest: list[InProgress]
    dead: int
    newest_dead: list[DeadLetter]

    @property
    def waiting(self) -> int:
        """Requests that were not delivered yet."""
        return self.unfinished - sum(self.in_progress.values())


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
        account=account if isinstance(account, dict) else to_dict(account),
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
    length, dead_length, letters, (in_progress, oldest) = await asyncio.gather(
        _read(redis, "XLEN", stream),
        _read(redis, "XLEN", dead),
        _read(redis, "XREVRANGE", dead, "+", "-", "COUNT", newest),
        _in_progress(redis, stream),
    )
    return StreamOverview(
        unfinished=length,
        in_progress=in_progress,
        oldest=oldest,
        dead=dead_length,
        newest_dead=[_dead_letter(entry_id, flat) for entry_id, flat in letters or ()],
    )


async def failing_commands(redis: RedisClient, keys: Keys, node: str) -> dict[str, str]:
    """The commands of a node that Redis denies or does not carry out now, and why. Raises `StoreError`."""
    answer = await LUA["check_rights"].run(redis, (keys.probe(node),), ())
    errors = ((command, error_from_reply(ResponseError(text))) for command, text in to_dict(answer).items())
    # A command that is refused for another reason lacks what a denied one would have made.
    return {command: str(error) for command, error in errors if not isinstance(error, StoreRefused)}


async def _read(redis: RedisClient, command: str, key: str, *rest: Argument) -> Any:  # noqa: ANN401 - what Redis answers
    try:
        return await redis.execute(command, key, *rest)
    except StoreRefused as refused:
        raise StoreRefused(f"{key}: {refused}") from None


async def _in_progress(redis: RedisClient, stream: str) -> tuple[dict[str, int], list[InProgress]]:
    with suppress(StoreRefused):  # no such stream or group
        summary, rows, now = await asyncio.gather(
            redis.execute("XPENDING", stream, GROUP),
            redis.execute("XPENDING", stream, GROUP, "-", "+", MAX_SHOWN),
            redis_now(redis),
        )
        counts = {consumer: int(count) for consumer, count in summary[3] or ()}
        ages = (to_timedelta(max(0, now - entry_time(row[0]))) for row in rows)
        return counts, [
            InProgress(entry_id, consumer, age, timedelta(milliseconds=idle), deliveries)
            for (entry_id, consumer, idle, deliveries), age in zip(rows, ages, strict=True)
        ]
    return {}, []


def _dead_letter(entry_id: str, flat: list[str]) -> DeadLetter:
    fields = to_dict(flat)
    return DeadLetter(
        entry_id=entry_id,
        dead_at=datetime.fromtimestamp(int(fields.get("dead_at") or entry_id.partition("-")[0]) / 1000, UTC),
        **{name: fields.get(name, "?") for name in ("user", "message_id", "attempts", "reason", "error")},
    )
