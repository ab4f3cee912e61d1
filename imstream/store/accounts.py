"""Accounts: bans, locks, violations and daily quotas. All keys of an account lie in the user's slot.

Bans and locks follow Redis' clock, days the clock of the node that took the message.
"""

import re
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from typing import Literal

from imstream.clock import Day, milliseconds
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.nodes import redis_now
from imstream.store.scripts import LUA
from imstream.user_ids import UserId

_NUMBER = re.compile(r"(?P<hex>0x[0-9a-fA-F]+)|[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""A number of Lua, as far as a person writes one."""
_LATEST_LOCK = 2e14  # as in the script

KEPT_AFTER_DAY = milliseconds(timedelta(hours=1))  # the tolerated difference between clocks


@dataclass(frozen=True, slots=True)
class Banned:
    """The user is banned."""


@dataclass(frozen=True, slots=True)
class Locked:
    """The user is locked for the time that is remaining."""

    remaining: timedelta


@dataclass(frozen=True, slots=True)
class AccountOpen:
    """The user is neither banned nor locked, and `used` messages are counted today. `new`: one of them by this call."""

    used: int
    new: bool = False


@dataclass(frozen=True, slots=True)
class QuotaExhausted:
    """A message is not allowed: the daily quota is used up."""


@dataclass(frozen=True, slots=True)
class ViolationRecorded:
    """A violation is counted, with `count` in the window. `nodes`: those to notify of a lock or ban."""

    count: int
    verdict: Literal["noted", "locked", "banned"]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Restricted:
    """A user is banned, or locked until a moment (ms since 1970). `nodes`: those to notify."""

    until: int
    nodes: tuple[str, ...]


class Accounts:
    """The accounts of all users."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._quota = settings.daily_quota
        self._reply_ttl = milliseconds(settings.reply_ttl)
        lock, window = milliseconds(settings.lock_time), milliseconds(settings.violation_window)
        self._penalty = (window, settings.lock_after, lock, settings.ban_after, f"node {settings.node}")

    async def check(self, user_id: UserId, day: Day) -> AccountOpen | Locked | Banned:
        """Check whether a user is banned or locked."""
        keys = (self._keys.account(user_id), self._keys.quota(user_id, day.name))
        verdict, *rest = await LUA["check_account_and_count"].run(self._redis, keys, ())
        return _restriction(verdict, rest) or AccountOpen(int(rest[0]))

    async def look(self, user_id: UserId) -> Locked | Banned | None:
        """As `check`, without a script: for operators whose Redis user may only read."""
        banned, locked = await self._redis.execute("HMGET", self._keys.account(user_id), "banned", "locked_until")
        if banned not in {None, "", "0"}:
            return Banned()
        number = _NUMBER.fullmatch("0" if locked is None else locked)
        until = inf if number is None else float.fromhex(number[0]) if number["hex"] else float(number[0])
        if until >= _LATEST_LOCK:
            return Banned()
        left = until - await redis_now(self._redis)
        return Locked(timedelta(milliseconds=left)) if left > 0 else None

    async def check_and_count(
        self, user_id: UserId, message_id: str, at: int, day: Day
    ) -> AccountOpen | QuotaExhausted | Locked | Banned:
        """Count a message if it is allowed. `at`: when it was asked, in milliseconds since 1970."""
        account, quota = self._keys.account(user_id), self._keys.quota(user_id, day.name)
        keys = (account, quota, self._keys.reply(user_id, message_id))
        arguments = (message_id, at, self._quota, self._reply_ttl, day.end + KEPT_AFTER_DAY)
        verdict, *rest = await LUA["check_account_and_count"].run(self._redis, keys, arguments)
        if (restriction := _restriction(verdict, rest)) is not None:
            return restriction
        return QuotaExhausted() if verdict == "spent" else AccountOpen(int(rest[0]), new=verdict == "counted")

    async def undo_count(self, user_id: UserId, message_id: str, at: int, day: Day) -> None:
        """Undo an `AccountOpen.new`: the message was not admitted."""
        await LUA["undo_count"].run(self._redis, (self._keys.quota(user_id, day.name),), (message_id, at))

    async def refund(self, user_id: UserId, message_id: str, day: Day) -> bool:
        """Remove a message from the count of its day: it was not answered. False when it is not counted. Idempotent."""
        return bool(await self._redis.execute("ZREM", self._keys.quota(user_id, day.name), message_id))

    async def reset_quota(self, user_id: UserId, day: Day) -> int:
        """Remove all messages from the count of a day; return how many there were."""
        key = self._keys.quota(user_id, day.name)
        used = int(await self._redis.execute("ZCARD", key))
        await self._redis.execute("DEL", key)
        return used

    async def record_violation(self, user_id: UserId) -> ViolationRecorded:
        """Count a violation, and lock or ban the user when there are too many."""
        keys = (self._keys.violations(user_id), self._keys.account(user_id), self._keys.route(user_id))
        count, verdict, *nodes = await LUA["record_violation"].run(self._redis, keys, self._penalty)
        return ViolationRecorded(int(count), verdict, tuple(nodes))

    async def lock(self, user_id: UserId, span: timedelta, *, reason: str, by: str) -> Restricted:
        """Lock a user for a time that begins now."""
        return await self._restrict(user_id, milliseconds(span), reason, by)

    async def ban(self, user_id: UserId, *, reason: str, by: str) -> Restricted:
        """Ban a user."""
        return await self._restrict(user_id, "ban", reason, by)

    async def unlock(self, user_id: UserId) -> bool:
        """Lift a lock; False when the account is not locked."""
        return await self._lift_restriction(user_id, "locked_until")

    async def unban(self, user_id: UserId) -> bool:
        """Lift a ban; False when the account is not banned."""
        return await self._lift_restriction(user_id, "banned")

    async def _restrict(self, user_id: UserId, lock_or_ban: int | str, reason: str, by: str) -> Restricted:
        keys = (self._keys.account(user_id), self._keys.route(user_id))
        until, *nodes = await LUA["restrict"].run(self._redis, keys, (lock_or_ban, reason, by))
        return Restricted(int(until), tuple(nodes))

    async def _lift_restriction(self, user_id: UserId, field: str) -> bool:
        keys = (self._keys.account(user_id), self._keys.violations(user_id))
        return bool(await LUA["lift_restriction"].run(self._redis, keys, (field,)))


def _restriction(verdict: str, rest: list[int]) -> Locked | Banned | None:
    if verdict == "banned":
        return Banned()
    return Locked(timedelta(milliseconds=int(rest[0]))) if verdict == "locked" else None
