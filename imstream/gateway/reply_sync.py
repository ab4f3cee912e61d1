"""Replies and notices from other nodes: reads the inbox of this node, and the records of replies written elsewhere."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import structlog

from imstream.errors import StoreError, StoreRefused
from imstream.gateway.presence import Presence
from imstream.gateway.registry import Registry
from imstream.logs import LIMITED, sanitize
from imstream.reply_buffer import ReplyBuffer, ReplyBuffers
from imstream.store.inbox import (
    AccountChanged,
    CancelRequested,
    DrainRequested,
    Inbox,
    MessageQueued,
    NodeLeft,
    Notice,
    ReplyGrew,
    SessionReplaced,
)
from imstream.store.replies import ReplyStore
from imstream.worker.adoption import Adopter
from imstream.worker.consumer import StreamConsumer
from imstream.worker.jobs import Jobs

_RETRY_INTERVAL = 0.2  # seconds between two attempts to read the inbox while Redis is not available

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


@dataclass(kw_only=True, repr=False)
class ReplySync:
    """Loads replies that are written on other nodes into the buffers of this one."""

    interval: timedelta
    replies: ReplyStore
    buffers: ReplyBuffers
    registry: Registry

    async def on_growth(self, notice: ReplyGrew) -> None:
        """Load entries that another node has added to a reply, if a session here follows it."""
        reply = self.buffers.find(notice.user_id, notice.message_id)
        if notice.begun:
            reply = self.buffers.get(notice.user_id, notice.message_id)
            reply.expect_more()
        if reply is not None:
            await self._catch_up_all([reply])
            if notice.begun:  # now it is known whether it continues after an end that was sent
                self.registry.follow_new(reply)

    async def on_queued(self, notice: MessageQueued) -> None:
        """Load the question of a message that another node has queued, if a session here wants it."""
        reply = self.buffers.get(notice.user_id, notice.message_id)
        if self.registry.follow_queued(reply):
            await self._catch_up_all([reply])

    async def catch_up(self, reply: ReplyBuffer) -> bool:
        """Load the entries recorded after those in the buffer. False when there is no record, or Redis has lost it.

        Raises:
            StoreError: Redis was not reached.
        """
        while not reply.has_writer and reply.terminal is None:
            position = reply.position
            record = await self.replies.read(reply.user_id, reply.message_id, after=position)
            if reply.position != position:
                continue  # another task has loaded more meanwhile, perhaps less than this one
            if record is None and position:
                reply.position = ""  # Redis has lost that entry, and perhaps has a later record
            elif record is None:
                return reply.has_writer
            elif reply.load(record):
                return True
        return True

    async def run(self) -> None:
        """Catch up with all unfinished replies from time to time: a notice may get lost."""
        while True:
            await asyncio.sleep(self.interval.total_seconds())
            await self._catch_up_all(self.buffers.unfinished_elsewhere())

    async def _catch_up_all(self, replies: list[ReplyBuffer]) -> None:
        for reply in replies:  # one by one: it is not urgent, and must not pile up while Redis is not available
            try:
                await self.catch_up(reply)
            except StoreError:
                return  # the next run retries
            except Exception:  # noqa: BLE001 - it is logged
                # Only a write by hand can have caused this. The others must continue.
                limited.exception("record cannot be read", user=reply.user_id, message_id=reply.message_id)


@dataclass(kw_only=True, repr=False)
class InboxConsumer:
    """Reads the inbox of this node and dispatches its notices. `run` until cancelled.

    `on_drain`: called with the instance of the process that is to drain; empty: any.
    """

    inbox: Inbox
    reply_sync: ReplySync
    presence: Presence
    jobs: Jobs
    consumer: StreamConsumer
    adopter: Adopter
    on_drain: Callable[[str], None]

    async def run(self) -> None:
        """Handle notices as they come; equal ones of one read only once."""
        refused = False
        while True:
            try:
                notices = await self.inbox.read()
                refused = False
            except StoreError as error:  # the worker logs that Redis is not available
                if isinstance(error, StoreRefused) and not refused:
                    refused = True
                    log.error("inbox cannot be read", error=str(error))  # noqa: TRY400 - the operator needs no trace
                await asyncio.sleep(_RETRY_INTERVAL)
                continue
            await asyncio.gather(*(self._handle(notice) for notice in dict.fromkeys(notices)))

    async def _handle(self, notice: Notice) -> None:
        try:
            match notice:
                case ReplyGrew(user_id, message_id):
                    if (job := self.jobs.find(user_id, message_id)) is not None:
                        await job.recheck()
                    await self.reply_sync.on_growth(notice)
                case MessageQueued():
                    await self.reply_sync.on_queued(notice)
                case CancelRequested(user_id, message_id):
                    if (job := self.jobs.find(user_id, message_id)) is not None:
                        job.stop("cancelled")
                case SessionReplaced():
                    self.presence.replace(notice)
                case AccountChanged(user_id):
                    await self.presence.review(user_id)
                case NodeLeft() | DrainRequested():
                    self._on_node(notice)
        except Exception:  # noqa: BLE001 - it is logged
            # A notice must not end the node: it may lead to a record that was written by hand.
            limited.exception("notice failed", notice=sanitize(str(notice)))

    def _on_node(self, notice: NodeLeft | DrainRequested) -> None:
        if isinstance(notice, DrainRequested):
            self.on_drain(notice.instance)
        else:
            self.consumer.sweep_soon()  # it may have adopted our stream before
            self.adopter.scan_now()
