"""One log line for all messages that are refused because of load, once a second at most."""

import asyncio
from collections import Counter
from typing import Literal

import structlog

from imstream.user_ids import UserId

INTERVAL = 1.0
"""Seconds from the first refusal until the line is written."""

log = structlog.get_logger()


class BusyLog:
    """Counts refused messages by reason: `BUSY` because the node, the user or Redis is full, or `RATE_LIMITED`."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._users = Counter[UserId | None]()

    def count(
        self, reason: Literal["node_full", "user_full", "redis_full", "rate_limited"], user: UserId | None
    ) -> None:
        """Count a refusal."""
        if not self._counts:
            asyncio.get_running_loop().call_later(INTERVAL, self._write)
        self._counts[reason] += 1
        self._users[user] += 1

    def _write(self) -> None:
        [(user, most)] = self._users.most_common(1)
        users = {"users": len(self._users), "top_user": user, "top_user_messages": most}
        log.warning("messages refused because of load", **self._counts, **users)
        self._counts.clear()
        self._users.clear()
