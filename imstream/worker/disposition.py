"""What becomes of a request: a pure decision, apart from the worker that carries it out.

    outcome of an attempt                            disposition
    ───────────────────────────────────────────────  ─────────────────────────────────────────────
    answered, cancelled                              Finish
    ended before, by this request, as failed         Bury: the dead letter is all that is missing; Decline: nothing is
    ended before, otherwise; a duplicate             Finish
    the backend refuses for good                     Bury, with the backend's reason
    a guard refuses the message, or the answer       Decline, with the guard's reason and sentence
    the backend failed, attempts and time are left   Retry, not before it asked for
    the backend failed, none are left                Bury, with the last reason
    another attempt took over; the node drains       Leave: it is, or will be, somebody else's

A request that died with its worker too often, or that cannot be read, is buried before it is tried. One that a newer
release wrote is left for a node that knows its schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.model import Refusal
from imstream.settings import Settings

WORKER_DIED = "worker_died"
MALFORMED = "malformed"
INTERNAL_ERROR = "internal_error"


MAX_EXTRA_ATTEMPTS = 30
"""Attempts beyond `max_attempts` after which a request is given up, however the earlier ones ended."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The reply has its terminal event: acknowledge and delete."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Not ours to end: leave it pending."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Begin another attempt, not before `after` has passed."""

    after: timedelta


@dataclass(frozen=True, slots=True)
class Bury:
    """Give up: tell the client `failed`, and move the request to the dead stream."""

    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Decline:
    """Give up because a guard refused it: tell the client `failed` and why, and acknowledge and delete.

    That is no dead letter: anybody can write such messages, again and again, and nobody is to try them again.
    """

    reason: str
    error: str
    refusal: Refusal


Disposition = Finish | Leave | Retry | Bury | Decline


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to go on.

    Attributes:
        attempts: AI calls for one request.
        deliveries: Times a request may die with its worker.
        window: No new attempt this long after the first one here.
    """

    attempts: int
    deliveries: int
    window: timedelta

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that are set."""
        return cls(settings.max_attempts, settings.max_deliveries, settings.retry_window)


def before_start(deliveries: int, limits: Limits) -> Bury | None:
    """Bury a request that has died with its worker as often as is allowed; None: try it."""
    if deliveries > limits.deliveries:
        return Bury(WORKER_DIED, f"its worker died {deliveries - 1} times while working on it")
    return None


def after_opening(attempt: int, limits: Limits) -> Bury | None:
    """Bury a request that has been begun so often that there must be something about it; None: go on.

    Deliveries count deaths of workers, but not those of which it cannot be told whether Redis went away first. A
    request that kills its worker, upon which a process runner stops everything else, must come to its end as well.
    """
    if attempt > limits.attempts + MAX_EXTRA_ATTEMPTS:
        return Bury(WORKER_DIED, f"it was begun {attempt - 1} times, and has not come to its end")
    return None


def after_failure(error: BackendError, *, attempt: int, elapsed: timedelta, limits: Limits) -> Retry | Bury:
    """Decide over a failed attempt.

    Args:
        error: What the backend did.
        attempt: The attempt that failed, from 1.
        elapsed: Time since this worker began with the request.
        limits: How long to go on.
    """
    if isinstance(error, PermanentBackendError):
        return Bury(error.reason, error.detail)
    after = (isinstance(error, TransientBackendError) and error.retry_after) or timedelta(0)
    if attempt >= limits.attempts or elapsed + after > limits.window:
        return Bury(error.reason, error.detail)
    return Retry(after)
