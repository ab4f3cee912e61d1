"""When a backend may be called: at once while it works, one by one while it is away, and paced when it is back."""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from math import exp

import structlog

from imstream.ai.failures import NEEDS_OPERATOR
from imstream.errors import BackendError
from imstream.settings import Settings

RATE_WINDOW = 10.0  # seconds over which the normal rate of calls is averaged
MIN_RATE = 2.0  # calls per second that are allowed in the first second after an outage, whatever the rate before it was
RECOVERY = 10  # seconds after an outage in which calls are paced; the rate doubles each second

SHARED_REASONS = frozenset({"connect_failed", "http_429", "http_503", "overloaded", *NEEDS_OPERATOR})
"""Failures that do not depend on the request. Others, such as time limits, count once for each user."""


log = structlog.get_logger()


class Breaker:
    """A circuit breaker: after several failures in a row, or a Retry-After, no new calls are made for a while.

        closed ──failures in a row, or Retry-After──▶ open ──pause over──▶ half-open ──success──▶ closed
                                                       ▲                       │
                                                       └────────failure────────┘   the pause doubles

    In the half-open state one call per pause is made, until one succeeds. Times are seconds of a monotonic clock.
    """

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
        self.tripped = False  # whether the breaker is open or half-open: no call has succeeded since it opened

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


class CallGate:
    """Tells when one backend may be called. Every call is reported: `begin`, `record_success` or `record_failure`."""

    def __init__(self, settings: Settings, name: str, *, on_back: Callable[[], None]) -> None:
        self.name = name
        self._on_back = on_back
        self._loop = asyncio.get_running_loop()
        self.breaker = Breaker(settings, clock=self._loop.time)
        self._rate, self._counted_at = 0.0, self._loop.time()
        self._normal_rate: float | None = None  # the rate before the current failures; None while calls succeed
        self._back_at: float | None = None  # when the backend came back; None while calls are not paced
        self._next_at = 0.0
        self._logged = set[str]()  # reasons that were logged since the last success
        self.reason: str | None = None  # why the last call failed, while the breaker is open or half-open
        self._away_since = 0.0
        self.period = 0
        """Grows when the breaker opens, and when the backend is back."""

    @property
    def is_closed(self) -> bool:
        """Whether calls have to wait."""
        return self.breaker.tripped or self._back_at is not None

    @property
    def state(self) -> str:
        """Its state for operators."""
        return "away" if self.breaker.tripped else "working" if self._back_at is None else "recovering"

    def delay(self) -> float:
        """Seconds until a call may be made; 0: now. Ends the paced time when it is over."""
        if self.breaker.tripped or self._back_at is None:
            return self.breaker.remaining()
        now = self._loop.time()
        if now - self._back_at >= RECOVERY:
            self._back_at = self._normal_rate = None
            return 0.0
        return max(0.0, self._next_at - now)

    def begin(self) -> None:
        """A call is made. While the breaker is half-open, it is the one call of this pause."""
        now = self._loop.time()
        if self.breaker.tripped:
            self.breaker.record_probe()
        elif self._back_at is not None:
            rate = max(self._normal_rate or 0.0, MIN_RATE) * 2.0 ** int(now - self._back_at)
            self._next_at = max(self._next_at, now) + 1 / rate
        elif self._normal_rate is None:
            self._rate, self._counted_at = self._decayed() + 1 / RATE_WINDOW, now

    def record_success(self) -> None:
        """A call has succeeded, or has its first text."""
        was_tripped = self.breaker.tripped
        self.breaker.record_success()
        if was_tripped and not self.breaker.tripped:
            self._back_at = self._next_at = self._loop.time()
            self.period += 1
            self._logged.clear()
            away = round(self._back_at - self._away_since, 1)
            log.info("backend is back", backend=self.name, reason=self.reason, away_seconds=away)
            self.reason = None
            self._on_back()
        elif self._back_at is None:
            self._normal_rate = None
            self._logged.clear()

    def record_failure(self, error: BackendError, *, user: object, period: int) -> None:
        """A call that began in `period` has failed.

        Only a backend that is away counts; a broken answer does not concern other calls. In an earlier period, only a
        Retry-After counts: nothing else is about the present.
        """
        if error.kind not in {"away", "misconfigured"} or (period != self.period and error.retry_after is None):
            return
        is_ours = error.kind == "misconfigured" or error.reason in NEEDS_OPERATOR
        if self._normal_rate is None:
            self._normal_rate = self._decayed()
        was_tripped = self.breaker.tripped
        shared = is_ours or error.reason in SHARED_REASONS
        self.breaker.record_failure(error.retry_after, source=None if shared else user)
        if self.breaker.tripped:
            self.reason = error.reason
            if not was_tripped:
                self._away_since = self._loop.time()
                self.period += 1
        if error.reason not in self._logged and (is_ours or self.breaker.tripped > was_tripped):
            self._logged.add(error.reason)
            event = "backend is misconfigured" if is_ours else "backend is away"
            why = {"reason": error.reason, "error": error.detail or error.reason}
            pause = {"pause_seconds": round(self.breaker.remaining(), 1)} if self.breaker.tripped else {}
            log.error(event, backend=self.name, **pause, **why)

    def _decayed(self) -> float:
        return self._rate * exp((self._counted_at - self._loop.time()) / RATE_WINDOW)
