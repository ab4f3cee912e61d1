"""The one interface of all guards: what they are asked, and what they may answer.

    moment      asked                                      by
    ──────────  ─────────────────────────────────────────  ─────────────────────────────────────
    handshake   may this page open a socket?               the gateway, before the socket is accepted
    login       is this who it says, and may they come in? the gateway, at INIT
    stay        may they stay?                             the gateway, when their account may have changed
    chat        may this message be asked?                 the gateway, before it is admitted
    request     the same, when it takes longer to find out the worker, before the first AI call
    answer      what of the answer may be shown?           the worker, piece by piece

and what they are told, if they want to know:

    violated    a guard has refused what a user wrote      the gateway or the worker
    failed      a request has ended without any text, and  the worker, before it is buried
                its user is not to blame

A guard overrides the moments at which it has something to say; the others cost nothing. The gateway's moments should
take microseconds, or one round trip to Redis. What takes longer belongs into the worker's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.model import ChatRequest
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.inbox import Inbox
from imstream.texts import Sentence
from imstream.wire import CloseCode, Code


@dataclass(frozen=True)
class GuardDeps:
    """What guards are made of."""

    settings: Settings
    redis: RedisClient
    inbox: Inbox
    assembler: PromptAssembler


@dataclass(frozen=True, slots=True)
class Handshake:
    """A request to open a socket. `headers`: by their names in lower case; several of one name are joined by commas."""

    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """Somebody says who they are.

    Attributes:
        token: What they show for it, from INIT or the handshake.
        origin: The origin of their page; None when they named none.
        peer: Their address, for the log.
    """

    user_id: int
    token: str | None = field(default=None, repr=False)
    origin: str | None = None
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Allow:
    """Nothing is wrong.

    Attributes:
        text: What the message says from now on, if that changes (chat, request).
        history: What was said before, if that changes (chat, request), as in `ChatRequest`.
        until: When the pass ends (login), in seconds since 1970.
        remaining: How many chats the user has left today (login, chat).
        undo: Takes back what the pass has cost, for a message that is not admitted after all (chat).
    """

    text: str | None = None
    history: tuple[tuple[str, str], ...] | None = None
    until: float | None = None
    remaining: int | None = None
    undo: Callable[[], Awaitable[None]] | None = None


ALLOW = Allow()
"""Nothing is wrong, and nothing changes."""


@dataclass(frozen=True, slots=True)
class Reject:
    """It goes no further.

    Attributes:
        reason: A stable word for logs, such as `words`.
        code: What a program is told.
        sentence: What a person is told; `values` fill its braces.
        retry_after: When to try again, if that may help.
        close: The socket is closed with this code (login, chat).
        violation: The person is to blame: it is counted, and too many lock the account.
        detail: What else an operator should know, in the log and in the record. Nothing of the text.
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
    """Raised in the worker for a request or an answer that goes no further."""

    def __init__(self, verdict: Reject) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


class AnswerFilter(Protocol):
    """Listens to one attempt at an answer and says what of it may be shown."""

    def feed(self, text: str) -> str:
        """Take the next piece; what may be shown by now, perhaps nothing. Raises `GuardRejection`."""
        ...

    def end(self) -> str:
        """The answer is complete: the rest of what may be shown. Raises `GuardRejection`."""
        ...


class Guard:
    """Passes everything. Guards are asked in the `order` of their classes, the lowest first, until one refuses."""

    order: ClassVar[int] = 50

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """The guard of a node; None when the settings leave it out.

        Raises:
            SettingsError: The settings of this guard contradict each other, or name what is not there.
        """
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """The node starts. Must not wait for anything that may be away."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The node ends."""

    async def reload(self) -> str | None:
        """SIGHUP: read again what was read from a file or an address; what that is, None when there is no such thing.

        What cannot be read leaves what there was before, and is logged.
        """
        return None

    def handshake(self, handshake: Handshake) -> Reject | None:  # noqa: ARG002 - for who overrides it
        """Whether a socket may be opened. A refusal is answered with HTTP 403."""
        return None

    async def login(self, login: LoginAttempt) -> Allow | Reject:  # noqa: ARG002 - same
        """Whether a user may come in. Raises `StoreError` when that cannot be told now."""
        return ALLOW

    async def stay(self, user_id: int) -> Reject | None:  # noqa: ARG002 - same
        """Whether a user who has come in may stay; if not, all sessions are closed. Raises `StoreError`."""
        return None

    async def chat(self, request: ChatRequest) -> Allow | Reject:  # noqa: ARG002 - same
        """Whether a message may be admitted. Raises `StoreError` when that cannot be told now."""
        return ALLOW

    async def request(self, request: ChatRequest) -> Allow | Reject:  # noqa: ARG002 - same
        """Whether a message may be given to the AI. Raises `BackendError` when that cannot be told now."""
        return ALLOW

    def answer(self, request: ChatRequest) -> AnswerFilter | None:  # noqa: ARG002 - same
        """Who listens to an attempt at an answer to this request; None: nobody."""
        return None

    async def violated(self, user_id: int) -> None:
        """A guard has refused what a user wrote."""

    async def failed(self, request: ChatRequest) -> None:
        """A request has failed, through no fault of its user and without text. May be told again.

        Raises:
            StoreError: Redis was not reached.
        """


def overrides(guard: Guard, moment: str) -> bool:
    """Whether a guard has something to say at a moment."""
    own: Any = getattr(type(guard), moment)
    return own is not getattr(Guard, moment)
