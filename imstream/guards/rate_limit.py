"""Rate limit of messages: per user and minute, on one node.

It is kept in memory for each user, whatever socket is used, so that reconnecting does not reset it. Every message
counts, also one that is then rejected as busy, or sent again. A minute's worth of messages may come at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.token_bucket import NEVER_USED, TokenBucket
from imstream.wire import Code

_TOO_MANY = Sentence(
    "您发送的消息过于频繁,请稍后再发送!", "You are sending too many messages, please wait a moment before the next one!"
)


class ChatRateLimit(Guard):
    """Rejects messages over the limit. It comes early, before checks that cost more."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket = TokenBucket(per_minute / 60, per_minute)
        self._clock = clock
        self._full_at: dict[int, float] = {}
        """When the bucket of each user is full again; users in the order of their last message."""

    def __len__(self) -> int:
        """Number of users with a bucket that is not full: at most those who sent a message within the last minute."""
        return len(self._full_at)

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        """See `Guard.create`."""
        per_minute = deps.settings.chats_per_minute
        return cls(per_minute) if per_minute else None

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard.check_chat`."""
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
