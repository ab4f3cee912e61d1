"""How many messages a user may ask in a minute, on one node.

Counted in memory, and for the user, whichever socket is used: who reconnects has no more. Each message that is asked
counts, also one that is then refused as busy, or asked again. As many as a minute has may come at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import ClassVar, Self

from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.token_bucket import NEVER_USED, TokenBucket
from imstream.wire import Code

_TOO_MANY = Sentence(
    "您发送的消息过于频繁,请稍后再发送!", "You are sending too many messages, please wait a moment before the next one!"
)


class ChatRateLimit(Guard):
    """Refuses the messages that are too many, before anything else has to be done for them."""

    order: ClassVar[int] = 10

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = TokenBucket(per_minute / 60, per_minute)
        self._clock = clock
        self._full_at: dict[int, float] = {}
        """When the buckets of users will be full again; the user who asked last is last."""

    def __len__(self) -> int:
        """How many users are remembered: at most those who have asked within a minute."""
        return len(self._full_at)

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """See `Guard`."""
        per_minute = supplies.settings.chats_per_minute
        return cls(per_minute) if per_minute else None

    async def chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard`."""
        now = self._clock()
        before = self._full_at.pop(request.user_id, NEVER_USED)
        after = self._pace.consume(before, now)
        wait = self._pace.wait_time(after, now)
        self._full_at[request.user_id] = before if wait else after
        if wait:
            return Reject("pace", Code.RATE_LIMITED, _TOO_MANY, retry_after=timedelta(seconds=wait))
        self._forget_full_ones(now)
        return ALLOW

    def _forget_full_ones(self, now: float) -> None:
        """Forget, from the one who has asked nothing for the longest time on, whose bucket is as if never used."""
        while self._full_at[longest_silent := next(iter(self._full_at))] <= now:
            del self._full_at[longest_silent]
