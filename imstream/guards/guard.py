"""The interface of guards: the hooks they implement and the verdicts they return.

    hook             question                                    called by
    ───────────────  ──────────────────────────────────────────  ───────────────────────────────────────
    check_handshake  may this page open a socket?                the gateway, before it accepts a socket
    check_login      is this user authenticated and allowed in?  the gateway, at INIT
    check_session    may this user stay connected?               the gateway, after an account has changed
    check_chat       may this message be admitted?               the gateway, before admission
    check_ai_call    the same, for checks that take long         the worker, before the first AI call
    answer_filter    what of the answer may be shown?            the worker, for each attempt

and two notifications:

    on_violation     a guard rejected what a user wrote          the gateway or the worker
    on_failure       a request failed without any text, and      the worker, before it moves the request to the
                     not because of its user                     dead letters

A guard implements the hooks it needs; the chain skips it for all others. The gateway's hooks must take microseconds, or
one round trip to Redis; slower checks belong in the worker's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, Self

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.model import ChatRequest
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.inbox import Inbox
from imstream.texts import Sentence
from imstream.wire import CloseCode, Code


@dataclass(frozen=True, kw_only=True)
class GuardDeps:
    """The objects of a node that guards are built from."""

    settings: Settings
    redis: RedisClient
    inbox: Inbox
    assembler: PromptAssembler


@dataclass(frozen=True, slots=True)
class Handshake:
    """A request to open a socket. `headers`: by lower-case name; repeated headers are joined by commas."""

    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """A login, not verified yet.

    Attributes:
        token: From INIT or the handshake.
        origin: Origin of the browser page; None for clients that send none.
        peer: Remote address, for the log.
    """

    user_id: int
    token: str | None = field(default=None, repr=False)
    origin: str | None = None
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Allow:
    """The guard has no objection.

    Attributes:
        text: Replaces the text of the message (check_chat, check_ai_call).
        history: Replaces its history, as in `ChatRequest` (check_chat, check_ai_call).
        expires_at: When the login expires, in seconds since 1970 (check_login).
        remaining: Messages that the user may still send today (check_login, check_chat).
        undo: Reverts what the check has counted, for a message that is not admitted after all (check_chat).
    """

    text: str | None = None
    history: tuple[tuple[str, str], ...] | None = None
    expires_at: float | None = None
    remaining: int | None = None
    undo: Callable[[], Awaitable[None]] | None = None


ALLOW = Allow()


@dataclass(frozen=True, slots=True)
class Reject:
    """The guard rejects the handshake, login, message or answer.

    Attributes:
        reason: Stable identifier for logs and metrics, such as `words`.
        code: Status code sent to the client.
        sentence: Text shown to the user; `values` fill its placeholders.
        retry_after: When a retry may succeed; None: not by waiting.
        close: Close the socket with this code (check_login, check_session, check_chat).
        violation: The user is to blame: it is counted, and too many of them lock the account.
        detail: More for operators, in the log and in the record. Must not contain text of the message.
    """

    reason: str
    code: Code
    sentence: Sentence
    values: Mapping[str, object] = field(default_factory=dict)
    retry_after: timedelta | None = None
    close: CloseCode | None = None
    violation: bool = False
    detail: str = ""


class GuardRejection(Exception):  # noqa: N818 - a verdict, not an error of ours
    """Raised in the worker when a guard rejects a request or an answer."""

    def __init__(self, verdict: Reject) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


class AnswerFilter(Protocol):
    """Filters the answer of one attempt. Both methods raise `GuardRejection`."""

    def feed(self, text: str) -> str:
        """Process the next piece. Returns what may be shown now, possibly nothing."""
        ...

    def end(self) -> str:
        """Complete the answer. Returns the rest that may be shown."""
        ...


class Guard:
    """Base class: every check allows. `StoreError` from a check means that Redis cannot tell now."""

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        """Build the guard; None when the settings disable it.

        Raises:
            SettingsError: The guard's settings contradict each other or name a missing file.
        """
        raise NotImplementedError

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold what the guard needs while the node runs. Entering must not wait for another service."""
        yield

    async def reload(self) -> str | None:
        """Read external data again, on SIGHUP. Returns a description of it; None: there is none.

        On failure, log it and keep the previous data.
        """
        return None

    def check_handshake(self, handshake: Handshake) -> Reject | None:  # noqa: ARG002 - for overriding methods
        """Check a handshake. A rejection is sent as HTTP 403."""
        return None

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:  # noqa: ARG002 - same
        """Check a login. Raises `StoreError`."""
        return ALLOW

    async def check_session(self, user_id: int) -> Reject | None:  # noqa: ARG002 - same
        """Check a user who is logged in. A rejection closes all the user's sessions. Raises `StoreError`."""
        return None

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:  # noqa: ARG002 - same
        """Check a message before admission. Raises `StoreError`."""
        return ALLOW

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:  # noqa: ARG002 - same
        """Check a message before its first AI call. Raises `BackendError` when the check itself fails."""
        return ALLOW

    def answer_filter(self, request: ChatRequest) -> AnswerFilter | None:  # noqa: ARG002 - same
        """Create the filter for one attempt; None: the answer is not filtered."""
        return None

    async def on_violation(self, user_id: int) -> None:
        """Handle a rejection for which the user is to blame."""

    async def on_failure(self, request: ChatRequest) -> None:
        """Handle a failed request that showed no text and whose user is not to blame.

        May be called again for the same request. Raises `StoreError`.
        """


def overrides(guard: Guard, hook: str) -> bool:
    """Whether a guard implements a hook."""
    own: Any = getattr(type(guard), hook)
    return own is not getattr(Guard, hook)
