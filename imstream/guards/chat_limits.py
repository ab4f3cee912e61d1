"""Limits of chat messages: how many a minute, with which roles, and how long."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.codes import Code
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.token_bucket import NEVER_USED, TokenBucket
from imstream.user_ids import UserId

_TOO_MANY = Sentence(
    "您发送的消息过于频繁,请稍后再发送!", "You are sending too many messages, please wait a moment before the next one!"
)
_SYSTEM_ROLE = Sentence(
    "不允许使用系统角色 (history.{number}.role: system)",
    "The role system is not allowed (history.{number}.role: system)",
)
_TOO_LONG = Sentence(
    "消息过长:约 {tokens:,} 个 token,最多 {possible:,} 个",
    "This message is too long: it has about {tokens:,} tokens, at most {possible:,} are possible",
)


class ChatRateLimit(Guard):
    """Rejects more messages a minute than the limit of each user on one node; so many may come at once.

    Every message counts, also one that is sent again or then rejected, and reconnecting does not reset the limit.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket = TokenBucket(per_minute / 60, per_minute)
        self._clock = clock
        self._full_at: dict[UserId, float] = {}
        """When the bucket of each user is full again; users in the order of their last message."""

    def __len__(self) -> int:
        """Number of users with a bucket that is not full: at most those who sent a message within the last minute."""
        return len(self._full_at)

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        per_minute = deps.settings.chats_per_minute
        return cls(per_minute) if per_minute else None

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        now = self._clock()
        before = self._full_at.pop(request.user_id, NEVER_USED)
        after = self._bucket.consume(before, now)
        wait = self._bucket.wait_time(after, now)
        self._full_at[request.user_id] = before if wait else after
        if wait:
            return Reject("pace", Code.RATE_LIMITED, _TOO_MANY, retry_after=timedelta(seconds=wait))
        while self._full_at[oldest := next(iter(self._full_at))] <= now:
            del self._full_at[oldest]
        return ALLOW


class SystemRole(Guard):
    """Rejects a history with turns of the role system: only the operator writes system prompts."""

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        return None if deps.settings.allow_system_role else cls()

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        for number, (role, _) in enumerate(request.history):
            if role == "system":
                return Reject("system_role", Code.FORBIDDEN, _SYSTEM_ROLE, {"number": number})
        return ALLOW


class ContextLength(Guard):
    """Rejects a message that exceeds the model's context even without its history."""

    def __init__(self, assembler: PromptAssembler) -> None:
        self._assembler = assembler

    @classmethod
    def create(cls, deps: GuardDeps) -> Self:
        return cls(deps.assembler)

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        excess = await self._assembler.excess(request)
        if excess is None:
            return ALLOW
        values = {"tokens": excess.tokens, "possible": excess.limit}
        return Reject("context_too_long", Code.BAD_REQUEST, _TOO_LONG, values)
