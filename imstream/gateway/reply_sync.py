"""Follows the replies that are written on other nodes: their records are read on, whenever there is a sign of more."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from imstream.errors import StoreError
from imstream.logs import LIMITED

if TYPE_CHECKING:
    from imstream.gateway.registry import Registry
    from imstream.reply_buffer import ReplyBuffer, ReplyBuffers
    from imstream.settings import Settings
    from imstream.store.inbox import ReplyGrew
    from imstream.store.replies import ReplyStore

limited = structlog.get_logger(**LIMITED)


class ReplySync:
    """Brings what is recorded elsewhere to the sessions of this node."""

    def __init__(self, settings: Settings, replies: ReplyStore, buffers: ReplyBuffers, registry: Registry) -> None:
        self._interval = settings.sweep_interval.total_seconds()
        self._replies = replies
        self._buffers = buffers
        self._registry = registry

    def begun(self, reply: ReplyBuffer) -> None:
        """An answer begins, here or elsewhere: every socket of the user follows it from now on."""
        for session in self._registry.of(reply.user_id):
            session.follow(reply)

    async def on_growth(self, notice: ReplyGrew) -> None:
        """Another node has added something to a reply."""
        reply = self._buffers.find(notice.user_id, notice.message_id)
        if notice.begun:
            reply = self._buffers.get(notice.user_id, notice.message_id)
            self.begun(reply)
        if reply is not None:
            await self._catch_up_with([reply])

    async def catch_up(self, reply: ReplyBuffer) -> bool:
        """Take over what is recorded beyond what is known here. False when nothing is known, here or there.

        Raises:
            StoreError: Redis was not reached.
        """
        while not reply.has_writer and reply.terminal is None:
            position = reply.position
            record = await self._replies.read(reply.user_id, reply.message_id, after=position)
            if reply.position != position:
                continue  # somebody else has read on meanwhile, perhaps less far
            if record is None:
                return position != "" or reply.has_writer
            if reply.load(record):
                return True
        return True

    async def run(self) -> None:
        """Look at all of them now and then: a notice may get lost."""
        while True:
            await asyncio.sleep(self._interval)
            await self._catch_up_with(self._buffers.unfinished_elsewhere())

    async def _catch_up_with(self, replies: list[ReplyBuffer]) -> None:
        for reply in replies:  # one by one: it is never urgent, and must not pile up while Redis is away
            try:
                await self.catch_up(reply)
            except StoreError:
                return  # they are looked at again
            except Exception:  # noqa: BLE001 - it is logged
                # It holds what only a hand from outside can have written. The others must go on.
                limited.exception("record cannot be read", user=reply.user_id, message_id=reply.message_id)
