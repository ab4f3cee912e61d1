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
class InWork:
    """A request that a worker has.

    Attributes:
        consumer: The id of the node that works on it.
        since: Time since it was given to that worker.
        deliveries: How often it was given to a worker that then died with it, this time included.
    """

    entry_id: str
    consumer: str
    since: timedelta
    deliveries: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that was given up."""

    entry_id: str
    died: datetime
    user: str
    message_id: str
    attempts: str
    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Overview:
    """One node's stream at a moment.

    Attributes:
        unfinished: Requests accepted and not ended.
        in_work: Those of them that workers have, by node.
        oldest: Those that workers have had for longest by their place in the stream, at most `MAX_SHOWN`.
        dead: Dead letters that are kept.
        newest_dead: The newest of them.
    """

    unfinished: int
    in_work: dict[str, int]
    oldest: list[InWork]
    dead: int
    newest_dead: list[DeadLetter]

    @property
    def waiting(self) -> int:
        """Requests that no worker has yet."""
        return self.unfinished - sum(self.in_work.values())


@dataclass(frozen=True, slots=True)
class UserOverview:
    """What is known of one user at a moment.

    Attributes:
        account: The fields of a ban or lock; it may be over.
        day: The date that `asked` is of.
        asked: Messages that are counted, newest first, and when each was asked (ms since 1970).
        violations: Contents that were refused lately.
        violations_for: How long these are remembered.
        nodes: Where the user has sockets.
    """

    account: dict[str, str]
    day: str
    asked: list[tuple[str, float]]
    violations: int
    violations_for: timedelta
    nodes: list[str]


async def look_at_user(commands: RedisClient, keys: Keys, user_id: int, day: Day) -> UserOverview:
    """Look at a user.

    Raises:
        StoreUnavailable: Redis was not reached.
        StoreRefused: A key is not what it should be: somebody wrote it by hand. The text names it.
    """
    account, asked, violations, left, nodes = await asyncio.gather(
        _read(commands, "HGETALL", keys.account(user_id)),
        _read(commands, "ZREVRANGE", keys.quota(user_id, day.name), 0, -1, "WITHSCORES"),
        _read(commands, "GET", keys.violations(user_id)),
        _read(commands, "PTTL", keys.violations(user_id)),
        _read(commands, "SMEMBERS", keys.route(user_id)),
    )
    if violations is not None and not violations.isdecimal():
        raise StoreRefused(f"{keys.violations(user_id)}: {violations!r} is no number")
    return UserOverview(
        account=account if isinstance(account, dict) else dict(zip(account[::2], account[1::2], strict=True)),
        day=day.name,
        asked=[(message_id, float(at)) for message_id, at in asked],
        violations=int(violations or 0),
        violations_for=timedelta(milliseconds=max(0, left)),
        nodes=sorted(nodes),
    )


async def _read(commands: RedisClient, command: str, key: str, *rest: Argument) -> Any:  # noqa: ANN401 - what Redis answers
    try:
        return await commands.execute(command, key, *rest)
    except StoreRefused as refused:
        raise StoreRefused(f"{key}: {refused}") from None


async def look(commands: RedisClient, keys: Keys, node: str, *, newest: int) -> Overview:
    """Look at the stream of a node, and at its `newest` dead letters; a node that never ran has none.

    Raises:
        StoreUnavailable: Redis was not reached.
        StoreRefused: A key is not what it should be: somebody wrote it by hand. The text names it.
    """
    stream, dead = keys.requests(node), keys.dead(node)
    length, dead_length, letters, (in_work, oldest) = await asyncio.gather(
        _read(commands, "XLEN", stream),
        _read(commands, "XLEN", dead),
        _read(commands, "XREVRANGE", dead, "+", "-", "COUNT", newest),
        _in_work(commands, stream),
    )
    return Overview(
        unfinished=length,
        in_work=in_work,
        oldest=oldest,
        dead=dead_length,
        newest_dead=[_dead_letter(entry_id, flat) for entry_id, flat in letters or ()],
    )


async def _in_work(commands: RedisClient, stream: str) -> tuple[dict[str, int], list[InWork]]:
    with suppress(StoreRefused):  # no such stream or group: nothing was ever read from it
        summary, rows = await asyncio.gather(
            commands.execute("XPENDING", stream, GROUP),
            commands.execute("XPENDING", stream, GROUP, "-", "+", MAX_SHOWN),
        )
        counts = {consumer: int(count) for consumer, count in summary[3] or ()}
        return counts, [InWork(row[0], row[1], timedelta(milliseconds=row[2]), row[3]) for row in rows]
    return {}, []


def _dead_letter(entry_id: str, flat: list[str]) -> DeadLetter:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return DeadLetter(
        entry_id=entry_id,
        died=datetime.fromtimestamp(int(fields.get("dead_at") or entry_id.partition("-")[0]) / 1000, UTC),
        **{name: fields.get(name, "?") for name in ("user", "message_id", "attempts", "reason", "error")},
    )
