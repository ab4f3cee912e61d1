"""Writes what one attempt says: into the reply at once, and batch by batch into the reply stream (I4, I5)."""

from __future__ import annotations

import asyncio

from imstream.model import Terminal
from imstream.redis.errors import retry_until_available
from imstream.reply_buffer import ReplyBuffer
from imstream.store.inbox import Inbox, ReplyGrew
from imstream.store.replies import Appended, Opened, Rejected, ReplyStore


class ReplyWriter:
    """The one writer of one attempt. Keeps how much of its text is recorded, and records the rest."""

    def __init__(self, reply: ReplyBuffer, replies: ReplyStore, inbox: Inbox, *, request: str, attempt: int) -> None:
        self._reply = reply
        self._replies = replies
        self._inbox = inbox
        self._request = request
        self._attempt = attempt
        self._recorded = 0
        self.read_elsewhere = True
        """Whether another node has sockets of the user, which may wait for the next batch. Each batch tells."""
        self._retired = False
        # Two appends at once could overtake each other on different connections.
        self._one_at_a_time = asyncio.Lock()
        reply.begin(attempt)

    @property
    def behind(self) -> bool:
        """Whether `flush` has anything to do, or to find out: that the reply is another's by now, or has ended."""
        return self._recorded < self._reply.offset or not self._is_ours or self._reply.terminal is not None

    def write(self, text: str) -> None:
        """Add a piece of text, unless nobody wants it any more: the reply has ended, or a later attempt has begun."""
        if self._is_ours and self._reply.terminal is None:
            self._reply.append(text)

    async def flush(self) -> Appended | Rejected:
        """Record the text that has gathered. Raises `StoreError`; then it is still there for the next time."""
        async with self._one_at_a_time:
            return await self._append(None) if self.behind else Appended()

    async def end(self, terminal: Terminal) -> Appended | Rejected:
        """Record the text that is left together with the end, however long it takes until Redis answers."""
        async with self._one_at_a_time:
            return await retry_until_available(lambda: self._append(terminal))

    async def retire(self) -> None:
        """Leave, and wait for what is on its way: another attempt is about to begin, and must stay the last one."""
        self._retired = True
        self.leave()
        async with self._one_at_a_time:
            return

    def leave(self) -> None:
        """Write no more. A reply that has not ended is left to whoever takes it up."""
        if self._is_ours and self._reply.terminal is None:
            self._reply.has_writer = False

    @property
    def _is_ours(self) -> bool:
        """Whether the text in the reply is that of this attempt."""
        return self._reply.attempt == self._attempt

    async def _append(self, terminal: Terminal | None) -> Appended | Rejected:
        result = await self._try_append(terminal)
        match result:
            case Rejected("gone") if not self._retired and await self._reopen():
                return await self._try_append(terminal)  # Redis lost the record, but here is all of it
            case Rejected("gap", offset=recorded) if recorded <= self._reply.offset:
                # An append of ours whose answer was lost; or Redis has lost the end of what it had.
                self._recorded = recorded
                return await self._try_append(terminal)
        return result

    async def _try_append(self, terminal: Terminal | None) -> Appended | Rejected:
        reply, after = self._reply, self._reply.offset
        if not self._is_ours:
            return Rejected("superseded")
        result = await self._replies.append(
            reply.user_id,
            reply.message_id,
            attempt=self._attempt,
            before=self._recorded,
            after=after,
            text=reply.text_from(self._recorded, limit=None),
            terminal=terminal,
        )
        if isinstance(result, Appended):
            self._recorded = after
            self.read_elsewhere = await self._inbox.notify(result.nodes, ReplyGrew(reply.user_id, reply.message_id))
        return result

    async def _reopen(self) -> bool:
        """Begin the same attempt once more, as if it had never been away."""
        reply = self._reply
        opened = await self._replies.open(
            reply.user_id, reply.message_id, request=self._request, after=self._attempt - 1
        )
        if not isinstance(opened, Opened) or not self._is_ours:
            return False
        self._attempt = reply.attempt = opened.attempt
        self._recorded = 0
        return True
