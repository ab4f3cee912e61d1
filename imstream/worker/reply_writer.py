"""Writes the text of one attempt: to the reply buffer at once, to the reply stream in batches (I4, I5)."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

from imstream.model import Question, Terminal, Waiting
from imstream.redis.errors import retry_until_available
from imstream.reply_buffer import ReplyBuffer
from imstream.store.inbox import Inbox, ReplyGrew
from imstream.store.replies import Appended, Opened, Rejected, ReplyStore, WaitRecorded
from imstream.store.scripts import Step


class ReplyWriter:
    """The only writer of one attempt. Keeps the offset up to which its text is recorded."""

    def __init__(  # noqa: PLR0913 - what it writes to, and for which request
        self,
        reply: ReplyBuffer,
        replies: ReplyStore,
        inbox: Inbox,
        *,
        request: str,
        opened: Opened,
        removal: Step[bool] | None = None,
    ) -> None:
        """`removal`: of the request, in one step with `done`, see `ReplyStore.append`."""
        self._reply = reply
        self._replies = replies
        self._inbox = inbox
        self._request = request
        self._removal = removal
        self.attempt = opened.attempt
        self.beginning = "" if opened.continued is None else opened.continued.text
        """The text that this attempt continues."""
        self._recorded = len(self.beginning)
        self._thinking = False
        """Whether the model reasons, by the last entry of the record."""
        self.has_remote_readers = True
        """Whether another node has sockets of the user, which may wait for the next batch. Each append returns it."""
        self._closed = False
        self._notice: asyncio.Task[None] | None = None
        """The last one of `announce`."""
        self._lock = asyncio.Lock()  # concurrent appends could overtake each other on different connections
        reply.begin(opened.attempt, opened.continued)

    @property
    def has_text(self) -> bool:
        """Whether this attempt has added text."""
        return self._reply.offset > len(self.beginning)

    @property
    def needs_flush(self) -> bool:
        """Whether there is text to record, or `flush` would find that the attempt was superseded or has ended."""
        reply = self._reply
        if self._recorded < reply.offset or not self._owns_buffer or reply.terminal is not None:
            return True
        return reply.is_thinking and not self._thinking

    def append(self, text: str) -> None:
        """Add a piece of text. Ignored when the reply has ended or a later attempt has begun."""
        if self._owns_buffer and self._reply.terminal is None:
            self._reply.append(text)

    def think(self, reasoning: str, *, keep: bool = False) -> None:
        """Note reasoning, see `ReplyBuffer.think`. Ignored when text would be."""
        if self._owns_buffer and self._reply.terminal is None:
            self._reply.think(reasoning, keep=keep)

    def forget_reasoning(self) -> None:
        """Discard the reasoning of a call that failed: the next one starts again."""
        if self._owns_buffer:
            self._reply.forget_reasoning()

    async def flush(self) -> Appended | Rejected:
        """Record the text so far. Raises `StoreError`; the next call then records it."""
        async with self._lock:
            return await self._record(None) if self.needs_flush else Appended()

    async def wait(self, why: Waiting, *, pause: timedelta, counts: bool = True) -> WaitRecorded | Rejected:
        """Record that the message waits, and show it; see `ReplyStore.wait`. Repeats until Redis answers."""
        reply = self._reply
        record = partial(self._replies.wait, reply.user_id, reply.message_id, pause=pause, why=why, counts=counts)

        async def wait() -> WaitRecorded | Rejected:
            return await retry_until_available(lambda: record(attempt=self.attempt))

        async with self._lock:
            result = await wait()
            if result == Rejected("gone"):
                await retry_until_available(lambda: self._record(None))  # Redis lost the record: it begins again
                result = await wait()
        if isinstance(result, WaitRecorded):
            self._thinking = False
            reply.wait(why)
            self.announce(result.nodes)
        return result

    async def end(self, terminal: Terminal) -> Appended | Rejected:
        """Record the rest of the text together with the terminal event. Repeats until Redis answers."""
        async with self._lock:
            return await retry_until_available(lambda: self._record(terminal))

    def announce(self, nodes: Sequence[str], *, begun: bool = False) -> None:
        """Notify nodes with a socket of the user, in parallel with later steps; it is sent when `settle` returns."""
        self.has_remote_readers = bool({*nodes} - {self._inbox.node})
        if self.has_remote_readers:
            self._notice = asyncio.create_task(self._notify(nodes, begun=begun, after=self._notice))

    async def _notify(self, nodes: Sequence[str], *, begun: bool, after: "asyncio.Task[None] | None") -> None:
        if after is not None:
            await after
        await self._inbox.notify(nodes, ReplyGrew(self._reply.user_id, self._reply.message_id, begun=begun))

    async def settle(self) -> None:
        """Wait until all notices are sent."""
        if self._notice is not None:
            await asyncio.shield(self._notice)

    async def close(self) -> None:
        """Release the buffer and wait for appends under way: the next attempt must be recorded after them."""
        self._closed = True
        self.release()
        async with self._lock:
            await self.settle()

    def release(self) -> None:
        """Stop writing. From now on, the record of an unfinished reply is newer than the buffer."""
        if self._owns_buffer and self._reply.terminal is None:
            self._reply.has_writer = False

    @property
    def _owns_buffer(self) -> bool:
        return self._reply.fence == self.attempt

    async def _record(self, terminal: Terminal | None) -> Appended | Rejected:
        result = await self._append_once(terminal)
        match result:
            case Rejected("gone") if not self._closed and await self._reopen():
                return await self._append_once(terminal)  # Redis lost the record, but the buffer has all of it
            case Rejected("gap", offset=recorded) if recorded <= self._reply.offset:
                # The answer to an earlier append was lost, or Redis has lost the end of the record.
                self._recorded = recorded
                return await self._append_once(terminal)
        return result

    async def _append_once(self, terminal: Terminal | None) -> Appended | Rejected:
        reply, after = self._reply, self._reply.offset
        if not self._owns_buffer:
            return Rejected("superseded")
        thinking = reply.is_thinking and self._recorded == after and terminal is None
        result = await self._replies.append(
            reply.user_id,
            reply.message_id,
            attempt=self.attempt,
            before=self._recorded,
            after=after,
            text=reply.text_from(self._recorded, limit=None),
            terminal=terminal,
            thinking=thinking,
            removal=self._removal if terminal is not None and terminal.event == "done" else None,
        )
        if isinstance(result, Appended):
            self._recorded, self._thinking = after, thinking
            self.announce(result.nodes)
            if terminal is None:  # the end is shown beside it
                await self.settle()
        return result

    async def _reopen(self) -> bool:
        """Begin the same attempt again, from the beginning of its text."""
        reply, before = self._reply, self.attempt - 1
        opened = await self._replies.open(
            reply.user_id, reply.message_id, reply.question or Question(""), request=self._request, after=before
        )
        if not isinstance(opened, Opened) or not self._owns_buffer:
            return False
        self.attempt = reply.fence = opened.attempt
        self._recorded, self._thinking = 0, False
        return True
