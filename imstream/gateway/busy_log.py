"""One log line for all messages that are refused because of load, once a second at most."""

import asyncio
from collections import Counter

import structlog

from imstream.metrics import Admission
from imstream.user_ids import UserId

LOAD = frozenset[Admission]({"busy", "user_busy", "rate_limited"})
"""Results of admissions that are refused because of load."""

INTERVAL = 1.0  # seconds from the first refusal until the line is written

log = structlog.get_logger()


class BusyLog:
    """Counts messages that are refused because of load."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._users = Counter[UserId]()

    def count(self, result: Admission, user: UserId) -> None:
        """Count a refusal."""
        if not self._counts:
            asyncio.get_running_loop().call_later(INTERVAL, self._write)
        self._counts[result] += 1
        self._users[user] += 1

    def _write(self) -> None:
        [(user, most)] = self._users.most_common(1)
        users = {"users": len(self._users), "top_user": user, "top_user_messages": most}
        log.warning("messages refused because of load", **self._counts, **users)
        self._counts.clear()
        self._users.clear()
