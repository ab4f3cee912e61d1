"""A circuit breaker: when the backend fails again and again, or asks to be left alone, no new work is begun for a time.

    closed ──failures in a row, or Retry-After──▶ open ──pause over──▶ half-open ──success──▶ closed
                                                   ▲                       │
                                                   └────────failure────────┘   the pause doubles

Half-open means: one request is begun in each pause, until one succeeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from imstream.settings import Settings


class Breaker:
    """Counts what happens to AI calls and says how long to hold back. Times are seconds of a monotonic clock."""

    def __init__(
        self, settings: Settings, *, failures: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`failures`: after how many in a row it opens, if not after `ai_breaker_failures`."""
        self._clock = clock
        self._threshold = settings.ai_breaker_failures if failures is None else failures
        self._first_pause = settings.ai_breaker_pause.total_seconds()
        self._longest_pause = settings.retry_wait_max.total_seconds()
        self._failures = 0
        self._pause = self._first_pause
        self._open_until = 0.0
        self._asked_until = 0.0

    @property
    def tripped(self) -> bool:
        """Whether no call has succeeded since the breaker last opened: try with one request at a time."""
        return self._open_until > 0.0

    def remaining(self) -> float:
        """Seconds until new work may begin; 0 when it may now."""
        return max(0.0, self._open_until - self._clock()) if self._open_until else 0.0

    def probing(self) -> None:
        """Work was begun to try whether the backend is back: no more until it succeeds, or for another pause."""
        self._open_until = max(self._open_until, self._clock() + self._pause)

    def succeeded(self) -> None:
        """A call was answered."""
        self._failures = 0
        self._pause = self._first_pause
        # A call that began before, or slipped through, does not lift what the backend asked for.
        self._open_until = self._asked_until if self._asked_until > self._clock() else 0.0

    def failed(self, retry_after: timedelta | None) -> None:
        """A call failed in a way that another may share."""
        self._failures += 1
        asked = min(retry_after.total_seconds(), self._longest_pause) if retry_after is not None else 0.0
        self._asked_until = max(self._asked_until, self._clock() + asked)
        if self._failures >= self._threshold and self.remaining() == 0.0:
            asked = max(asked, self._pause)
            self._pause = min(2 * self._pause, self._longest_pause)
        if asked:
            self._open_until = max(self._open_until, self._clock() + asked)
