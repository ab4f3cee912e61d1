"""The disposition of a request: a pure decision, carried out by the job.

    outcome of an attempt                            disposition
    ───────────────────────────────────────────────  ─────────────────────────────────────────────
    answered, cancelled                              Finish
    ended before, by this request, as failed         Bury: only the dead letter is missing; or Decline
    ended before, otherwise; a duplicate             Finish
    a guard rejects the message, or the answer       Decline, with the guard's reason and sentence
    the request cannot be answered (impossible)      Bury, with the backend's reason
    the backend is away, or our configuration of it
    is wrong; its text has not begun                 the next backend, within this attempt (`may_move_on`)
    … and none is left                               Wait within this attempt, not less than it asked for
    … and the retry window is over                   Bury, with the last reason
    the answer broke, attempts are left              Retry, not before the time it asked for
    … and none are left                              Bury, with the last reason
    superseded by another attempt; the node drains   Leave: another node ends it

A request that died with its worker too often, or that cannot be read, is buried without an attempt. One that a newer
release wrote is left to a node that supports its schema.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from imstream.errors import BackendError, FailureKind
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
class Wait:
    """The backend is away: call it again in the same attempt, not before `after`, and give up after `window`."""

    after: timedelta
    window: timedelta
    error: BackendError


@dataclass(frozen=True, slots=True)
class Bury:
    """Give up: record `failed`, and move the request to the dead stream. `kind`: see `BackendError`."""

    reason: str
    error: str
    kind: FailureKind | None = None


@dataclass(frozen=True, slots=True)
class Decline:
    """Give up because of a guard: record `failed` with the guard's sentence, then acknowledge and delete.

    It makes no dead letter: users could send any number of such messages, and a retry is pointless.
    """

    reason: str
    error: str
    refusal: Refusal


Disposition = Finish | Leave | Retry | Wait | Bury | Decline


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum attempts and worker deaths of one request, and the time that it waits for backends that are away."""

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
    """Bury a request that was begun too often; None: continue.

    The count of deliveries leaves out deaths at which Redis was restarted, too. This limit also ends a request that
    kills its worker when a process manager then restarts everything.
    """
    if attempt > limits.attempts + MAX_EXTRA_ATTEMPTS:
        return Bury(WORKER_DIED, f"it was begun {attempt - 1} times, and has not come to its end")
    return None


def may_move_on(error: BackendError, *, has_text: bool) -> bool:
    """Whether another backend may answer in the same attempt, at once. `has_text`: the failed call has shown text."""
    return error.kind in {"away", "misconfigured"} and not has_text


def after_failure(
    error: BackendError, *, counted: int, has_text: bool, waited: timedelta, limits: Limits
) -> Retry | Wait | Bury:
    """Decide after a failed call.

    Args:
        error: The failure, with its class (`kind`).
        counted: Attempts so far that count, with this one.
        has_text: This attempt has text: then its answer is broken, even if the backend is away now.
        waited: Time since the first failure that made the message wait, on any node.
        limits: The limits of the settings.
    """
    after = error.retry_after or timedelta(0)
    bury = Bury(error.reason, error.detail or error.reason, error.kind)
    match error.kind:
        case "away" | "misconfigured" if not has_text:
            left = limits.window - waited
            return Wait(min(after, left), left, error) if left > timedelta(0) else bury
        case "impossible":
            return bury
    return Retry(after) if counted < limits.attempts else bury


def after_rejection(verdict: Reject, lang: str) -> Decline:
    """Decline a request that a guard rejected; its sentence is in the language of the user."""
    sentence = localize(verdict.sentence, "en" if lang == "en" else DEFAULT_LANG, **verdict.values)
    error = localize(verdict.sentence, "en", **verdict.values)
    if verdict.detail:
        error = f"{error} ({verdict.detail})"
    return Decline(verdict.reason, error, Refusal(verdict.code, sentence, verdict.violation))
