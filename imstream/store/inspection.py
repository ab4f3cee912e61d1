"""Looks at a node's stream, or at a user, without changing anything: for `imstream streams` and `imstream user`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from imstream.clock import Day
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.redis.client import Argument, RedisClient

MAX_SHOWN = 20
"""Most requests in work that are listed; they are counted all the same."""


@dataclass(frozen=True, slots=True)
class InProgress:
    """A request that a worker has.

    Attributes:
        consumer: The id of the node that works on it.
        since: Time since it was given to that worker.
        deliveries: How often it was given to a worker that then dead_at with it, this time included.
    """

    entry_id: str
    consumer: str
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
    """One node's stream at a moment.

    Attributes:
        unfinished: Requests accepted and not ended.
        in_progress: Those of them that workers have, by node.
        oldest: Those that workers have had for longest by their place in the stream, at most `MAX_SHOWN`.
        dead: Dead letters that are kept.
        newest_dead: The newest of them.
    """

    unfinished: int
    in_progress: dict[str, int]
    oldest: list[InProgress]
    dead: int
    newest_dead: list[DeadLetter]

    @property
    def waiting(self) -> int:
        """Requests that no worker has yet."""
        return self.unfinished - sum(self.in_progress.values())


@dataclass(frozen=True, slots=True)
class UserOverview:
    """What is known of one user at a moment.

    Attributes:
        account: The fields of a ban or lock; it may be over.
        day: The date that `asked` is of.
        asked: Messages that are counted, newest first, and when each was asked (ms since 1970).
        violations: Contents that were refused lately.
        violations_expire_in: How long these are remembered.
        nodes: Where the user has sockets.
    """

    account: dict[str, str]
    day: str
    counted: list[tuple[str, float]]
    violations: int
    violations_expire_in: timedelta
    nodes: list[str]


async def inspect_user(redis: RedisClient, keys: Keys, user_id: int, day: Day) -> UserOverview:
    """Look at a user.

    Raises:
        StoreUnavailable: Redis was not reached.
        StoreRefused: A key is not what it should be: somebody wrote it by hand. The text names it.
    """
    account, asked, violations, left, nodes = await asyncio.gather(
        _read(redis, "HGETALL", keys.account(user_id)),
        _read(redis, "ZREVRANGE", keys.quota(user_id, day.name), 0, -1, "WITHSCORES"),
        _read(redis, "GET", keys.violations(user_id)),
        _read(redis, "PTTL", keys.violations(user_id)),
        _read(redis, "SMEMBERS", keys.route(user_id)),
    )
    if violations is not None and not violations.isdecimal():
        raise StoreRefused(f"{keys.violations(user_id)}: {violations!r} is no number")
    return UserOverview(
        account=account if isinstance(account, dict) else dict(zip(account[::2], account[1::2], strict=True)),
        day=day.name,
        counted=[(message_id, float(at)) for message_id, at in asked],
        violations=int(violations or 0),
        violations_expire_in=timedelta(milliseconds=max(0, left)),
        nodes=sorted(nodes),
    )


async def _read(redis: RedisClient, command: str, key: str, *rest: Argument) -> Any:  # noqa: ANN401 - what Redis answers
    try:
        return await redis.execute(command, key, *rest)
    except StoreRefused as refused:
        raise StoreRefused(f"{key}: {refused}") from None


async def inspect_stream(redis: RedisClient, keys: Keys, node: str, *, newest: int) -> StreamOverview:
    """Look at the stream of a node, and at its `newest` dead letters; a node that never ran has none.

    Raises:
        StoreUnavailable: Redis was not reached.
        StoreRefused: A key is not what it should be: somebody wrote it by hand. The text names it.
    """
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


async def _in_progress(redis: RedisClient, stream: str) -> tuple[dict[str, int], list[InProgress]]:
    with suppress(StoreRefused):  # no such stream or group: nothing was ever read from it
        summary, rows = await asyncio.gather(
            redis.execute("XPENDING", stream, GROUP),
            redis.execute("XPENDING", stream, GROUP, "-", "+", MAX_SHOWN),
        )
        counts = {consumer: int(count) for consumer, count in summary[3] or ()}
        return counts, [InProgress(row[0], row[1], timedelta(milliseconds=row[2]), row[3]) for row in rows]
    return {}, []


def _dead_letter(entry_id: str, flat: list[str]) -> DeadLetter:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return DeadLetter(
        entry_id=entry_id,
        dead_at=datetime.fromtimestamp(int(fields.get("dead_at") or entry_id.partition("-")[0]) / 1000, UTC),
        **{name: fields.get(name, "?") for name in ("user", "message_id", "attempts", "reason", "error")},
    )
