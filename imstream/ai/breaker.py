"""A circuit breaker: after several failures in a row, or a Retry-After, no new calls are made for a while.

    closed ──failures in a row, or Retry-After──▶ open ──pause over──▶ half-open ──success──▶ closed
                                                   ▲                       │
                                                   └────────failure────────┘   the pause doubles

In the half-open state one call per pause is made, until one succeeds.
"""

import time
from collections.abc import Callable
from datetime import timedelta

from imstream.settings import Settings


class Breaker:
    """Counts the results of calls and computes the waiting time. Times are seconds of a monotonic clock."""

    def __init__(
        self, settings: Settings, *, failures: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`failures` in a row open the breaker; the default is `ai_breaker_failures`."""
        self._clock = clock
        self._threshold = settings.ai_breaker_failures if failures is None else failures
        self._min_pause = settings.ai_breaker_pause.total_seconds()
        self._max_pause = settings.retry_wait_max.total_seconds()
        self._failures = 0
        self._sources = set[object]()
        self._pause = self._min_pause
        self._open_until = 0.0
        self._retry_after_until = 0.0
        self.tripped = False
        """Whether the breaker is open or half-open: no call has succeeded since it opened."""

    def remaining(self) -> float:
        """Seconds until a call may be made; 0 if now."""
        return max(0.0, self._open_until - self._clock()) if self._open_until else 0.0

    def record_probe(self) -> None:
        """The one call of the half-open state is made: open for another pause, unless it succeeds."""
        self._open_for(self._pause)

    def record_success(self) -> None:
        """A call has succeeded."""
        self._failures = 0
        self._sources.clear()
        self._pause = self._min_pause
        # A call that began earlier does not end a Retry-After.
        self._open_until = self._retry_after_until if self._retry_after_until > self._clock() else 0.0
        self.tripped = self._open_until > 0.0

    def record_failure(self, retry_after: timedelta | None, *, source: object = None) -> None:
        """A call has failed for a reason that other calls may share. Failures of one `source`, if given, count once."""
        if source is None or source not in self._sources:
            self._failures += 1
            self._sources.add(source)
        pause = min(retry_after.total_seconds(), self._max_pause) if retry_after is not None else 0.0
        self._retry_after_until = max(self._retry_after_until, self._clock() + pause)
        if self._failures >= self._threshold and self.remaining() == 0.0:
            pause = max(pause, self._pause)
            self._pause = min(2 * self._pause, self._max_pause)
        if pause:
            self._open_for(pause)

    def _open_for(self, pause: float) -> None:
        self._open_until = max(self._open_until, self._clock() + pause)
        self.tripped = self._open_until > 0.0
