"""Writes what one attempt says into the reply stream, batch by batch (I4, I5)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from imstream.store.patience import patiently
from imstream.store.replies import Appended, Opened, Rejected

if TYPE_CHECKING:
    from imstream.reply import Reply
    from imstream.store.replies import ReplyStore, Terminal


class Recorder:
    """Keeps how much of a reply is recorded, and records the rest, as the attempt that `reply.attempt` names."""

    def __init__(self, reply: Reply, replies: ReplyStore, *, request: str) -> None:
        self._reply = reply
        self._replies = replies
        self._request = request
        self._recorded = 0
        # Two appends at once could overtake each other on different connections.
        self._one_at_a_time = asyncio.Lock()

    @property
    def behind(self) -> bool:
        """Whether there is text that is not recorded."""
        return self._recorded < self._reply.offset

    async def flush(self) -> Appended | Rejected:
        """Record the text that has gathered. Raises `StoreError`; then it is still there for the next time."""
        async with self._one_at_a_time:
            return await self._append(None) if self.behind else Appended()

    async def end(self, terminal: Terminal) -> Appended | Rejected:
        """Record the text that is left together with the end, however long it takes until Redis answers."""
        async with self._one_at_a_time:
            return await patiently(lambda: self._append(terminal))

    async def _append(self, terminal: Terminal | None) -> Appended | Rejected:
        result = await self._try_append(terminal)
        if result == Rejected("gone") and await self._reopen():
            # Redis lost the record, but here is all of it.
            result = await self._try_append(terminal)
        return result

    async def _try_append(self, terminal: Terminal | None) -> Appended | Rejected:
        reply, after = self._reply, self._reply.offset
        result = await self._replies.append(
            reply.user_id,
            reply.message_id,
            attempt=reply.attempt,
            before=self._recorded,
            after=after,
            text=reply.text_from(self._recorded, limit=None),
            terminal=terminal,
        )
        if isinstance(result, Appended):
            self._recorded = after
        return result

    async def _reopen(self) -> bool:
        reply = self._reply
        opened = await self._replies.open(reply.user_id, reply.message_id, request=self._request)
        if not isinstance(opened, Opened):
            return False
        reply.attempt = opened.attempt
        self._recorded = 0
        return True
