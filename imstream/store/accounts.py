"""Accounts: who is banned or locked, and what each user has asked today. All of it lies in the user's slot.

Bans and locks are told by Redis' clock, days by that of the node that took the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from imstream.clock import Day, milliseconds
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

KEPT_AFTER_DAY = milliseconds(timedelta(hours=1))
"""For how many milliseconds the messages of a day are kept after its end: by that much clocks may differ."""

_CHECK_ACCOUNT_AND_COUNT = load_script("check_account_and_count")
_UNDO_COUNT = load_script("undo_count")
_RECORD_VIOLATION = load_script("record_violation")
_RESTRICT = load_script("restrict")
_LIFT_RESTRICTION = load_script("lift_restriction")


@dataclass(frozen=True, slots=True)
class Banned:
    """The user does not come in."""


@dataclass(frozen=True, slots=True)
class Locked:
    """The user does not come in for `left`."""

    remaining: timedelta


@dataclass(frozen=True, slots=True)
class AccountOpen:
    """The user may come in, and has asked `used` messages today."""

    used: int


@dataclass(frozen=True, slots=True)
class Counted:
    """A message may be asked; with it `used` are today. `new`: it was not counted before."""

    used: int
    new: bool


@dataclass(frozen=True, slots=True)
class QuotaExhausted:
    """A message may not be asked: the user has asked enough today."""


@dataclass(frozen=True, slots=True)
class ViolationRecorded:
    """A refused content is counted.

    Attributes:
        count: How many there are lately.
        verdict: What has become of the user now.
        nodes: Those that hold a socket of the user and are to be told, when the user is locked or banned.
    """

    count: int
    verdict: Literal["noted", "locked", "banned"]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Restricted:
    """A user is banned, or locked until a moment (ms since 1970). `nodes`: those to tell."""

    until: int
    nodes: tuple[str, ...]


class Accounts:
    """The accounts of all users."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._quota = settings.daily_quota
        self._same_for = milliseconds(settings.reply_ttl)
        lock, window = milliseconds(settings.lock_time), milliseconds(settings.violation_window)
        self._blame = (window, settings.lock_after, lock, settings.ban_after, f"node {settings.node}")

    async def check(self, user_id: int, day: Day) -> AccountOpen | Locked | Banned:
        """Whether a user may come in."""
        keys = (self._keys.account(user_id), self._keys.quota(user_id, day.name))
        verdict, *rest = await _CHECK_ACCOUNT_AND_COUNT.run(self._redis, keys, ())
        return _kept_out(verdict, rest) or AccountOpen(int(rest[0]))

    async def check_and_count(
        self, user_id: int, message_id: str, at: int, day: Day
    ) -> Counted | QuotaExhausted | Locked | Banned:
        """Count a message, unless it may not be asked. `at`: when it is asked, in milliseconds since 1970."""
        keys = self._keys
        verdict, *rest = await _CHECK_ACCOUNT_AND_COUNT.run(
            self._redis,
            (keys.account(user_id), keys.quota(user_id, day.name), keys.reply(user_id, message_id)),
            (message_id, at, self._quota, self._same_for, day.end + KEPT_AFTER_DAY),
        )
        if (kept_out := _kept_out(verdict, rest)) is not None:
            return kept_out
        return QuotaExhausted() if verdict == "spent" else Counted(int(rest[0]), new=verdict == "counted")

    async def undo_count(self, user_id: int, message_id: str, at: int, day: Day) -> None:
        """Take back what `count` has counted as new: the message was not admitted."""
        await _UNDO_COUNT.run(self._redis, (self._keys.quota(user_id, day.name),), (message_id, at))

    async def refund(self, user_id: int, message_id: str, day: Day) -> bool:
        """Count a message of that day no more: it was not answered. May be repeated; False when it is not counted."""
        return bool(await self._redis.execute("ZREM", self._keys.quota(user_id, day.name), message_id))

    async def reset_quota(self, user_id: int, day: Day) -> int:
        """Begin a day anew; how many messages were counted."""
        key = self._keys.quota(user_id, day.name)
        used = int(await self._redis.execute("ZCARD", key))
        await self._redis.execute("DEL", key)
        return used

    async def record_violation(self, user_id: int) -> ViolationRecorded:
        """Count a content that was refused, and lock or ban the user who has written too many."""
        keys = (self._keys.violations(user_id), self._keys.account(user_id), self._keys.route(user_id))
        count, verdict, *nodes = await _RECORD_VIOLATION.run(self._redis, keys, self._blame)
        return ViolationRecorded(int(count), verdict, tuple(nodes))

    async def lock(self, user_id: int, span: timedelta, *, reason: str, by: str) -> Restricted:
        """Lock a user for so long from now on."""
        return await self._restrict(user_id, milliseconds(span), reason, by)

    async def ban(self, user_id: int, *, reason: str, by: str) -> Restricted:
        """Ban a user."""
        return await self._restrict(user_id, "ban", reason, by)

    async def unlock(self, user_id: int) -> bool:
        """Take a lock back; False when there is none."""
        return await self._pardon(user_id, "locked_until")

    async def unban(self, user_id: int) -> bool:
        """Take a ban back; False when there is none."""
        return await self._pardon(user_id, "banned")

    async def _restrict(self, user_id: int, how: int | str, reason: str, by: str) -> Restricted:
        keys = (self._keys.account(user_id), self._keys.route(user_id))
        until, *nodes = await _RESTRICT.run(self._redis, keys, (how, reason, by))
        return Restricted(int(until), tuple(nodes))

    async def _pardon(self, user_id: int, what: str) -> bool:
        keys = (self._keys.account(user_id), self._keys.violations(user_id))
        return bool(await _LIFT_RESTRICTION.run(self._redis, keys, (what,)))


def _kept_out(verdict: str, rest: list[int]) -> Locked | Banned | None:
    if verdict == "banned":
        return Banned()
    return Locked(timedelta(milliseconds=int(rest[0]))) if verdict == "locked" else None
