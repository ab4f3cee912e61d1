"""When a backend may be called: at once while it works, one by one while it is away, and paced when it is back."""

import asyncio
from collections.abc import Callable
from math import exp

import structlog

from imstream.ai.breaker import Breaker
from imstream.ai.failures import NEEDS_OPERATOR
from imstream.errors import BackendError
from imstream.settings import Settings

RATE_WINDOW = 10.0
"""Seconds over which the normal rate of calls is averaged."""

MIN_RATE = 2.0
"""Calls per second that are allowed in the first second after an outage, whatever the rate before it was."""

RECOVERY = 10
"""Seconds after an outage in which calls are paced; the rate doubles each second."""

SHARED_REASONS = frozenset({"connect_failed", "http_429", "http_503", "overloaded", *NEEDS_OPERATOR})
"""Failures that do not depend on the request. Others, such as time limits, count once for each user."""


log = structlog.get_logger()


class CallGate:
    """Tells when one backend may be called. Every call is reported: `begin`, `record_success` or `record_failure`."""

    def __init__(self, settings: Settings, name: str, *, on_back: Callable[[], None]) -> None:
        self.name = name
        self._on_back = on_back
        self._loop = asyncio.get_running_loop()
        self.breaker = Breaker(settings, clock=self._loop.time)
        self._rate, self._counted_at = 0.0, self._loop.time()
        self._normal_rate: float | None = None
        """The rate before the failures that are going on; None while calls succeed."""
        self._back_at: float | None = None
        """When the backend came back; None while calls are not paced."""
        self._next_at = 0.0
        self._logged = set[str]()
        """Reasons that were logged since the last success."""
        self.reason: str | None = None
        """Why the last call failed, while the breaker is open or half-open."""
        self._away_since = 0.0

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
            self._logged.clear()
            away = round(self._back_at - self._away_since, 1)
            log.info("backend is back", backend=self.name, reason=self.reason, away_seconds=away)
            self.reason = None
            self._on_back()
        elif self._back_at is None:
            self._normal_rate = None
            self._logged.clear()

    def record_failure(self, error: BackendError, *, user: object) -> None:
        """A call has failed. Only a backend that is away counts; a broken answer does not concern other calls."""
        if error.kind not in {"away", "misconfigured"}:
            return
        is_ours = error.kind == "misconfigured" or error.reason in NEEDS_OPERATOR
        if self._normal_rate is None:
            self._normal_rate = self._decayed()
        was_tripped = self.breaker.tripped
        shared = is_ours or error.reason in SHARED_REASONS
        self.breaker.record_failure(error.retry_after, source=None if shared else user)
        if self.breaker.tripped:
            self.reason = error.reason
            self._away_since = self._away_since if was_tripped else self._loop.time()
        if error.reason not in self._logged and (is_ours or self.breaker.tripped > was_tripped):
            self._logged.add(error.reason)
            event = "backend is misconfigured" if is_ours else "backend is away"
            why = {"reason": error.reason, "error": error.detail or error.reason}
            pause = {"pause_seconds": round(self.breaker.remaining(), 1)} if self.breaker.tripped else {}
            log.error(event, backend=self.name, **pause, **why)

    def _decayed(self) -> float:
        return self._rate * exp((self._counted_at - self._loop.time()) / RATE_WINDOW)
