"""Accounts: bans, temporary locks and the daily quota."""

from contextlib import suppress
from datetime import timedelta
from zoneinfo import ZoneInfo

import structlog

from imstream.clock import Calendar, now_ms
from imstream.codes import CloseCode, Code
from imstream.errors import StoreError
from imstream.guards.guard import Allow, Guard, GuardDeps, LoginAttempt, Reject
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.store.accounts import Accounts, Banned, Locked, QuotaExhausted
from imstream.store.inbox import AccountChanged, Inbox
from imstream.texts import Sentence
from imstream.user_ids import UserId

BANNED = Sentence(
    "您的账号已被封禁,如有疑问请联系客服!", "This account is banned. If you think that is wrong, please contact us!"
)
LOCKED = Sentence("您的账号已被暂时锁定,{until} 之后可以再次使用!", "This account is locked until {until}!")
QUOTA_EXHAUSTED = Sentence(
    "您今天的 {quota} 条消息已用完,请在 {until} 之后再发送!",
    "Your {quota} messages for today are used up, please come back after {until}!",
)

log = structlog.get_logger()


class Account(Guard):
    """Rejects banned and locked users. Messages are not checked: nodes are notified, and close sessions."""

    def __init__(self, accounts: Accounts, inbox: Inbox, settings: Settings) -> None:
        self._accounts = accounts
        self._inbox = inbox
        self._quota = settings.daily_quota
        self._calendar = Calendar(ZoneInfo(settings.quota_timezone))

    @classmethod
    def create(cls, deps: GuardDeps) -> "Account":
        kind = AccountWithQuota if deps.settings.daily_quota else Account
        return kind(Accounts(deps.redis, deps.settings), deps.inbox, deps.settings)

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:
        status = await self._accounts.check(login.user_id, self._calendar.day(now_ms()))
        if isinstance(status, Banned | Locked):
            return self._reject(status)
        return Allow(remaining=max(0, self._quota - status.used) if self._quota else None)

    async def check_session(self, user_id: UserId) -> Reject | None:
        status = await self._accounts.check(user_id, self._calendar.day(now_ms()))
        return self._reject(status) if isinstance(status, Banned | Locked) else None

    async def on_violation(self, user_id: UserId) -> None:
        """Count the violation. If it locks or bans the user, notify all nodes, this one too, to close the sessions."""
        try:
            violation = await self._accounts.record_violation(user_id)
        except StoreError as error:
            log.warning("a violation is not counted", user=user_id, error=str(error))
            return
        if violation.verdict != "noted":
            log.warning("account restricted", user=user_id, verdict=violation.verdict, violations=violation.count)
            await self._inbox.notify(violation.nodes, AccountChanged(user_id), include_self=True)

    def _reject(self, status: Banned | Locked) -> Reject:
        if isinstance(status, Banned):
            return Reject("banned", Code.FORBIDDEN, BANNED, close=CloseCode.LOCKED)
        values = {"until": self._calendar.format(now_ms() + status.remaining // timedelta(milliseconds=1))}
        return Reject("locked", Code.FORBIDDEN, LOCKED, values, retry_after=status.remaining, close=CloseCode.LOCKED)


class AccountWithQuota(Account):
    """Also rejects more messages a day than the quota; each message takes one round trip to Redis.

    It is counted before its admission, and uncounted when it is not admitted, or fails without text and not because of
    its user. If the node dies before the admission, it stays counted; sent again with the same id, it is not counted
    twice.
    """

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        """Count the message against the quota, unless the account is banned or locked."""
        user_id, message_id, at = request.user_id, request.message_id, request.at
        accounts, day = self._accounts, self._calendar.day(at)
        result = await accounts.check_and_count(user_id, message_id, at, day)
        if isinstance(result, Banned | Locked):
            return self._reject(result)
        if isinstance(result, QuotaExhausted):
            values = {"quota": self._quota, "until": self._calendar.format(day.end)}
            until_next_day = timedelta(milliseconds=day.end - at)
            return Reject("quota", Code.RATE_LIMITED, QUOTA_EXHAUSTED, values, retry_after=until_next_day)
        undo = (lambda: accounts.undo_count(user_id, message_id, at, day)) if result.new else None
        return Allow(remaining=max(0, self._quota - result.used), undo=undo)

    async def on_failure(self, request: ChatRequest) -> None:
        """Uncount the message, on the day on which it was sent."""
        with suppress(ValueError, OverflowError, OSError):  # entries edited by hand may have an impossible time
            await self._accounts.refund(request.user_id, request.message_id, self._calendar.day(request.at))
