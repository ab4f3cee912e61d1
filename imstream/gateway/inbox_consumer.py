"""Listens to the inbox of this node, and passes on what other nodes have to tell."""

from __future__ import annotations

import asyncio

import structlog

from imstream.errors import StoreError, StoreRefused
from imstream.gateway.presence import Presence
from imstream.gateway.reply_sync import ReplySync
from imstream.logs import LIMITED, sanitize
from imstream.store.inbox import AccountChanged, Inbox, NodeLeft, Notice, ReplyGrew, SessionReplaced
from imstream.worker.adoption import Adopter
from imstream.worker.jobs import Jobs

_AGAIN = 0.2
"""Seconds between two tries while Redis is away."""

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


class InboxConsumer:
    """Reads the inbox. `run` until cancelled."""

    def __init__(self, inbox: Inbox, *, following: ReplySync, presence: Presence, jobs: Jobs, adopter: Adopter) -> None:
        self._inbox = inbox
        self._following = following
        self._presence = presence
        self._jobs = jobs
        self._adopter = adopter

    async def run(self) -> None:
        """Take notices as they come, those that are the same only once."""
        refused = False
        while True:
            try:
                notices = await self._inbox.read()
                refused = False
            except StoreError as error:  # the worker says that Redis is away
                if isinstance(error, StoreRefused) and not refused:
                    refused = True
                    log.error("inbox cannot be read", error=str(error))  # noqa: TRY400 - the operator needs no trace
                await asyncio.sleep(_AGAIN)
                continue
            await asyncio.gather(*(self._take(notice) for notice in dict.fromkeys(notices)))

    async def _take(self, notice: Notice) -> None:
        try:
            await self._obey(notice)
        except Exception:  # noqa: BLE001 - it is logged
            # What one notice leads to must not end the node: a record that a hand from outside has spoilt, say.
            limited.exception("notice failed", notice=sanitize(str(notice)))

    async def _obey(self, notice: Notice) -> None:
        match notice:
            case ReplyGrew(user_id, message_id):
                await self._jobs.recheck(user_id, message_id)
                await self._following.on_growth(notice)
            case SessionReplaced():
                self._presence.replace(notice)
            case AccountChanged(user_id):
                await self._presence.review(user_id)
            case NodeLeft():
                self._adopter.scan_now()
