"""Accounts: a banned or locked user does not come in, and may ask so many messages a day.

Without a daily quota a chat costs nothing here: whoever bans or locks a user leaves a notice, upon which nodes ask
`stay` and close the user's sessions. With one, ban, lock and quota are one round trip to Redis.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import ClassVar, Self
from zoneinfo import ZoneInfo

import structlog

from imstream.clock import Calendar, now_ms
from imstream.errors import StoreError
from imstream.guards.guard import Allow, Guard, GuardDeps, LoginAttempt, Reject
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.store.accounts import Accounts, Banned, Locked, QuotaExhausted
from imstream.store.inbox import AccountChanged, Inbox
from imstream.texts import Sentence
from imstream.wire import CloseCode, Code

BANNED = Sentence(
    "您的账号已被封禁,如有疑问请联系客服!", "This account is banned. If you think that is wrong, please contact us!"
)
LOCKED = Sentence("您的账号已被暂时锁定,{until} 之后可以再次使用!", "This account is locked until {until}!")
SPENT = Sentence(
    "您今天的 {quota} 条消息已用完,请在 {until} 之后再发送!",
    "Your {quota} messages for today are used up, please come back after {until}!",
)

log = structlog.get_logger()


class Account(Guard):
    """Bans and locks, where there is no daily quota."""

    # After all who may refuse as well: nobody is told of an account that is not theirs, and nothing is counted in vain.
    order: ClassVar[int] = 90
    counts: ClassVar[bool] = False

    def __init__(self, accounts: Accounts, inbox: Inbox, settings: Settings) -> None:
        self._accounts = accounts
        self._inbox = inbox
        self._quota = settings.daily_quota
        self._calendar = Calendar(ZoneInfo(settings.quota_timezone))

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """One of the two: this one, or the one that counts too."""
        settings = supplies.settings
        if cls.counts != (settings.daily_quota > 0):
            return None
        return cls(Accounts(supplies.redis, settings), supplies.inbox, settings)

    async def login(self, login: LoginAttempt) -> Allow | Reject:
        """Whether the account is neither banned nor locked; and how many messages are left today."""
        standing = await self._accounts.check(login.user_id, self._calendar.day(now_ms()))
        if isinstance(standing, Banned | Locked):
            return self._keep_out(standing)
        return Allow(remaining=self._remaining(standing.used))

    async def stay(self, user_id: int) -> Reject | None:
        """Whether it still is."""
        standing = await self._accounts.check(user_id, self._calendar.day(now_ms()))
        return self._keep_out(standing) if isinstance(standing, Banned | Locked) else None

    async def violated(self, user_id: int) -> None:
        """Count it. When that is one too many, have all nodes close the user's sessions, this one too."""
        try:
            blamed = await self._accounts.record_violation(user_id)
        except StoreError as error:
            log.warning("a refused content is not counted", user=user_id, error=str(error))
            return
        if blamed.verdict != "noted":
            log.warning("account restricted", user=user_id, verdict=blamed.verdict, violations=blamed.count)
            await self._inbox.notify(blamed.nodes, AccountChanged(user_id), include_self=True)

    def _remaining(self, used: int) -> int | None:
        return max(0, self._quota - used) if self.counts else None

    def _keep_out(self, standing: Banned | Locked) -> Reject:
        if isinstance(standing, Banned):
            return Reject("banned", Code.FORBIDDEN, BANNED, close=CloseCode.LOCKED)
        until = self._calendar.format(now_ms() + standing.remaining // timedelta(milliseconds=1))
        return Reject(
            *("locked", Code.FORBIDDEN, LOCKED, {"until": until}),
            retry_after=standing.remaining,
            close=CloseCode.LOCKED,
        )


class AccountWithQuota(Account):
    """Bans and locks, and how many messages a user may ask each day.

    A message is counted before it is admitted, and given back when it is not, or fails without any text and through no
    fault of its user. A node that dies before the admission leaves it counted; sent again with the same id, it passes
    without being counted a second time.
    """

    counts: ClassVar[bool] = True

    async def chat(self, request: ChatRequest) -> Allow | Reject:
        """Count the message, if the account is neither banned nor locked and has one left."""
        user_id, message_id, at = request.user_id, request.message_id, request.at
        accounts, day = self._accounts, self._calendar.day(at)
        verdict = await accounts.check_and_count(user_id, message_id, at, day)
        if isinstance(verdict, Banned | Locked):
            return self._keep_out(verdict)
        if isinstance(verdict, QuotaExhausted):
            values = {"quota": self._quota, "until": self._calendar.format(day.end)}
            return Reject(
                *("quota", Code.RATE_LIMITED, SPENT, values), retry_after=timedelta(milliseconds=day.end - at)
            )
        remaining = self._remaining(verdict.used)
        if not verdict.new:
            return Allow(remaining=remaining)
        return Allow(remaining=remaining, undo=lambda: accounts.undo_count(user_id, message_id, at, day))

    async def failed(self, request: ChatRequest) -> None:
        """Give it back: on the day on which it was asked."""
        with suppress(ValueError, OverflowError, OSError):  # somebody wrote that time by hand, beyond all years
            await self._accounts.refund(request.user_id, request.message_id, self._calendar.day(request.at))
