"""The disposition of a request: a pure decision, carried out by the job.

    outcome of an attempt                            disposition
    ───────────────────────────────────────────────  ─────────────────────────────────────────────
    answered, cancelled                              Finish
    ended before, by this request, as failed         Bury: only the dead letter is missing; or Decline
    ended before, otherwise; a duplicate             Finish
    the backend fails permanently                    Bury, with the backend's reason
    a guard rejects the message, or the answer       Decline, with the guard's reason and sentence
    the backend failed, attempts and time are left   Retry, not before the time it asked for
    the backend failed, none are left                Bury, with the last reason
    superseded by another attempt; the node drains   Leave: another node ends it

A request that died with its worker too often, or that cannot be read, is buried without an attempt. One that a newer
release wrote is left to a node that knows its schema.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.guards.guard import Reject
from imstream.model import Refusal
from imstream.settings import Settings
from imstream.texts import DEFAULT_LANG, localize

WORKER_DIED = "worker_died"
MALFORMED = "malformed"
INTERNAL_ERROR = "internal_error"

MAX_EXTRA_ATTEMPTS = 30
"""Attempts beyond `max_attempts` after which a request is buried, however the earlier ones ended."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The reply has its terminal event: acknowledge and delete the request."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Another node ends it: leave the request pending."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Begin another attempt, not before `after` has passed."""

    after: timedelta


@dataclass(frozen=True, slots=True)
class Bury:
    """Give up: record `failed`, and move the request to the dead stream."""

    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Decline:
    """Give up because of a guard: record `failed` with the guard's sentence, then acknowledge and delete.

    It makes no dead letter: users could send any number of such messages, and a retry is pointless.
    """

    reason: str
    error: str
    refusal: Refusal


Disposition = Finish | Leave | Retry | Bury | Decline


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum AI calls and worker deaths of one request, and time from its first to its last attempt on one node."""

    attempts: int
    deliveries: int
    window: timedelta

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the limits of the settings."""
        return cls(settings.max_attempts, settings.max_deliveries, settings.retry_window)


def before_start(deliveries: int, limits: Limits) -> Bury | None:
    """Bury a request that has died with its worker too often; None: make an attempt."""
    if deliveries > limits.deliveries:
        return Bury(WORKER_DIED, f"its worker died {deliveries - 1} times while working on it")
    return None


def after_opening(attempt: int, limits: Limits) -> Bury | None:
    """Bury a request that was begun too often; None: go on.

    The count of deliveries leaves out deaths at which Redis was restarted, too. This limit also ends a request that
    kills its worker when a process manager then restarts everything.
    """
    if attempt > limits.attempts + MAX_EXTRA_ATTEMPTS:
        return Bury(WORKER_DIED, f"it was begun {attempt - 1} times, and has not come to its end")
    return None


def after_failure(error: BackendError, *, attempt: int, elapsed: timedelta, limits: Limits) -> Retry | Bury:
    """Decide after a failed attempt, numbered from 1. `elapsed`: time since the first attempt of this worker."""
    if isinstance(error, PermanentBackendError):
        return Bury(error.reason, error.detail)
    after = (isinstance(error, TransientBackendError) and error.retry_after) or timedelta(0)
    if attempt >= limits.attempts or elapsed + after > limits.window:
        return Bury(error.reason, error.detail)
    return Retry(after)


def after_rejection(verdict: Reject, lang: str) -> Decline:
    """Decline a request that a guard rejected; its sentence is in the language of the user."""
    sentence = localize(verdict.sentence, "en" if lang == "en" else DEFAULT_LANG, **verdict.values)
    error = localize(verdict.sentence, "en", **verdict.values)
    if verdict.detail:
        error = f"{error} ({verdict.detail})"
    return Decline(verdict.reason, error, Refusal(verdict.code, sentence, verdict.violation))
