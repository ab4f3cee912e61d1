"""The interface of guards: the hooks that they override, and the verdicts that hooks return.

The chain calls a hook only for guards that override it. Hooks of the gateway must take microseconds, or one round trip
to Redis; slower checks belong in `check_ai_call`, which the worker runs.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.codes import CloseCode, Code
from imstream.model import ChatRequest
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.inbox import Inbox
from imstream.texts import Sentence
from imstream.user_ids import UserId


@dataclass(frozen=True, kw_only=True)
class GuardDeps:
    """The objects of a node that guards are built from."""

    settings: Settings
    redis: RedisClient
    inbox: Inbox
    assembler: PromptAssembler


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """A login, not verified yet."""

    user_id: UserId
    token: str | None = field(default=None, repr=False)  # from INIT or the handshake
    origin: str | None = None  # of the browser page; other clients send none
    peer: str = ""  # remote address, for the log


@dataclass(frozen=True, slots=True)
class Allow:
    """The guard has no objection. Names in parentheses are the hooks that use a field."""

    text: str | None = None  # replaces the text of the message (check_chat, check_ai_call)
    history: tuple[tuple[str, str], ...] | None = None  # replaces its history, as in `ChatRequest` (same)
    expires_at: float | None = None  # when the login expires, in seconds since 1970 (check_login)
    remaining: int | None = None  # messages that the user may still send today (check_login, check_chat)
    undo: Callable[[], Awaitable[None]] | None = None  # uncounts a message that is not admitted after all (check_chat)


ALLOW = Allow()


@dataclass(frozen=True, slots=True)
class Reject:
    """The guard rejects the handshake, login, message or answer."""

    reason: str  # stable identifier for logs and metrics, such as `words`
    code: Code
    sentence: Sentence  # shown to the user; `values` fill its placeholders
    values: Mapping[str, object] = field(default_factory=dict)
    retry_after: timedelta | None = None
    close: CloseCode | None = None  # closes the socket (check_login, check_session, check_chat)
    violation: bool = False  # caused by the user: it is counted, and too many lock the account
    detail: str = ""  # for operators, in the log and in the record; must not contain text of the message


class GuardRejection(Exception):  # noqa: N818 - a verdict, not an error of ours
    """Raised in the worker when a guard rejects a request or an answer."""

    def __init__(self, verdict: Reject) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


class AnswerFilter(Protocol):
    """Filters the answer of one attempt. All methods raise `GuardRejection`."""

    def feed(self, text: str) -> str:
        """Process the next piece. Returns the text that may be shown now, possibly empty."""

    def end(self) -> str:
        """Complete the answer. Returns the rest that may be shown."""

    def seed(self, shown: str) -> int | None:
        """Process the beginning of the answer, which was shown. Returns how many characters at its end are buffered.

        None: the answer cannot continue from there, because the filter has changed the text, or may change shown text.
        """


class Guard:
    """Base class of guards; every check allows. `StoreError` from a check means that Redis is needed and away."""

    @classmethod
    def create(cls, deps: GuardDeps) -> "Guard | None":
        """Build the guard; None when the settings disable it. Raises `SettingsError`."""
        raise NotImplementedError

    def running(self) -> AbstractAsyncContextManager[None]:
        """Hold the resources of the guard while the node runs. Entering must not wait for another service."""
        return nullcontext()

    async def reload(self) -> str | None:
        """Read external data again, on SIGHUP, and return its name. On failure, keep the previous data."""
        return None

    def check_handshake(self, headers: Mapping[str, str]) -> Reject | None:  # noqa: ARG002 - for overriding methods
        """Check the page that opens a socket, before the gateway accepts it. A rejection is sent as HTTP 403.

        `headers`: by lower-case name; repeated headers are joined by commas.
        """
        return None

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:  # noqa: ARG002 - same
        """Check the identity of a user and whether they may log in, at INIT. Raises `StoreError`."""
        return ALLOW

    async def check_session(self, user_id: UserId) -> Reject | None:  # noqa: ARG002 - same
        """Check a connected user again, after their account changed. A rejection closes all their sessions."""
        return None

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:  # noqa: ARG002 - same
        """Check a message in the gateway, before its admission. Raises `StoreError`."""
        return ALLOW

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:  # noqa: ARG002 - same
        """Check a message in the worker, before its first AI call. Raises `BackendError` when it cannot decide."""
        return ALLOW

    def answer_filter(self, request: ChatRequest) -> AnswerFilter | None:  # noqa: ARG002 - same
        """Create the filter for an attempt in the worker; None: the answer is not filtered."""
        return None

    async def on_violation(self, user_id: UserId) -> None:
        """Handle a violation by a user, found in the gateway or the worker."""

    async def on_failure(self, request: ChatRequest) -> None:
        """Handle the failure of a request without text and not because of its user, in the worker; possibly again."""
