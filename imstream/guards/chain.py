"""The guards of a node, in order, and the chain that calls them one after the other."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Self

import structlog

from imstream.errors import StoreError
from imstream.guards.account import Account
from imstream.guards.authentication import Exposure, TokenAuthentication
from imstream.guards.chat_limits import ChatRateLimit, ContextLength, SystemRole
from imstream.guards.guard import ALLOW, Allow, AnswerFilter, Guard, GuardDeps, GuardRejection, LoginAttempt, Reject
from imstream.guards.moderation import Moderation
from imstream.guards.origin import Origin
from imstream.guards.words.word_guard import WordGuard
from imstream.logs import LIMITED
from imstream.model import ChatRequest
from imstream.user_ids import UserId

# The guards, with the cases that they reject, in the order of their calls; the first rejection ends it. To add a
# guard, write a subclass of `Guard` in a module of this package and list it here.
GUARDS: tuple[type[Guard], ...] = (
    Exposure,  # without authentication: sockets from other machines
    Origin,  # sockets of browser pages whose origin is not allowed
    TokenAuthentication,  # logins without a valid token of this user
    ChatRateLimit,  # more messages per minute than allowed
    SystemRole,  # history with turns of the role system
    WordGuard,  # listed words in messages, history and answers; may mask them instead, so it comes before the length
    ContextLength,  # messages longer than the model's context
    Moderation,  # messages that the moderation service flags; in the worker
    # Last: only verified users may learn about an account, and only messages that pass all guards are counted.
    Account,  # banned and locked users; more messages per day than allowed
)

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


@dataclass(frozen=True, slots=True)
class ChatAllowed:
    """A message that every guard allows. `request`: the message as the guards changed it."""

    request: ChatRequest
    remaining: int | None
    verdicts: Sequence[Allow]

    async def undo(self) -> None:
        """Revert the counts of the guards, if the message is not admitted. Without Redis it stays counted."""
        for verdict in self.verdicts:
            if verdict.undo is not None:
                try:
                    await verdict.undo()
                except StoreError as error:
                    log.warning("a refused message stays counted", user=self.request.user_id, error=str(error))


class GuardChain:
    """Asks the guards of one node in order. Each hook calls only the guards that implement it."""

    def __init__(self, guards: Iterable[Guard] = ()) -> None:
        self.guards = list(guards)
        self._by_hook = {
            hook: [guard for guard in self.guards if getattr(type(guard), hook) is not default]
            for hook, default in vars(Guard).items()
            if callable(default)
        }
        self.rejections = Counter[str]()  # since the start, by reason

    @classmethod
    def create(cls, deps: GuardDeps) -> Self:
        """Build the guards of `GUARDS` that the settings enable. Raises `SettingsError`."""
        return cls(guard for kind in GUARDS if (guard := kind.create(deps)) is not None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run all guards; see `Guard.running`."""
        async with AsyncExitStack() as stack:
            for guard in self.guards:
                await stack.enter_async_context(guard.running())
            yield

    async def reload(self) -> list[str]:
        """Reload all guards. Returns the names of the reloaded data."""
        reloaded = list[str | None]()
        for guard in self.guards:
            try:
                reloaded.append(await guard.reload())
            except Exception:
                log.exception("not reloaded", guard=type(guard).__name__)
        return [what for what in reloaded if what is not None]

    def check_handshake(self, headers: Mapping[str, str]) -> Reject | None:
        for guard in self._by_hook["check_handshake"]:
            if (rejection := guard.check_handshake(headers)) is not None:
                self.rejections[rejection.reason] += 1
                return rejection
        return None

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:
        """The earliest expiry and the lowest number of remaining messages apply."""
        verdicts: list[Allow] = []
        for guard in self._by_hook["check_login"]:
            verdict = await guard.check_login(login)
            if isinstance(verdict, Reject):
                self.rejections[verdict.reason] += 1
                limited.info("login refused", reason=verdict.reason, user=login.user_id, peer=login.peer)
                return verdict
            verdicts.append(verdict)
        expiries = (one.expires_at for one in verdicts if one.expires_at is not None)
        return Allow(expires_at=min(expiries, default=None), remaining=_remaining(verdicts))

    async def check_session(self, user_id: UserId) -> Reject | None:
        for guard in self._by_hook["check_session"]:
            if (rejection := await guard.check_session(user_id)) is not None:
                return rejection
        return None

    async def check_chat(self, request: ChatRequest, *, peer: str = "") -> ChatAllowed | Reject:
        """See `Guard.check_chat`. Each guard sees the message as the previous ones changed it. `peer` is logged."""
        verdicts: list[Allow] = []
        for guard in self._by_hook["check_chat"]:
            verdict = await guard.check_chat(request)
            if isinstance(verdict, Reject):
                await ChatAllowed(request, None, verdicts).undo()
                await self.record_rejection(verdict, request, peer)
                return verdict
            if verdict is not ALLOW:
                request = _apply(verdict, request)
                verdicts.append(verdict)
        return ChatAllowed(request, _remaining(verdicts), verdicts)

    async def check_ai_call(self, request: ChatRequest) -> ChatRequest:
        """See `Guard.check_ai_call`. Returns the request as the guards changed it. Raises `GuardRejection`."""
        for guard in self._by_hook["check_ai_call"]:
            verdict = await guard.check_ai_call(request)
            if isinstance(verdict, Reject):
                await self.record_rejection(verdict, request)
                raise GuardRejection(verdict)
            request = request if verdict is ALLOW else _apply(verdict, request)
        return request

    def answer_filter(self, request: ChatRequest, write: Callable[[str], None]) -> "FilterChain | None":
        """Create the filters between the AI and `write` for one attempt; None: no guard filters this answer."""
        filters = [one for guard in self._by_hook["answer_filter"] if (one := guard.answer_filter(request)) is not None]
        return FilterChain(filters, write) if filters else None

    async def on_failure(self, request: ChatRequest) -> None:
        for guard in self._by_hook["on_failure"]:
            await guard.on_failure(request)

    async def record_rejection(self, verdict: Reject, request: ChatRequest, peer: str = "") -> None:
        """Count and log the rejection of a message or its answer. If it is a violation, notify the guards."""
        self.rejections[verdict.reason] += 1
        # Violations are few, since they lock the account; the number of other rejections has no bound.
        write = log.info if verdict.violation else limited.info
        details = {name: value for name, value in (("peer", peer), ("detail", verdict.detail)) if value}
        write("message refused", reason=verdict.reason, **request.ids, **details)
        if verdict.violation:
            for guard in self._by_hook["on_violation"]:
                await guard.on_violation(request.user_id)


class FilterChain:
    """Passes an answer through all filters of an attempt, in order. Both methods raise `GuardRejection`."""

    def __init__(self, filters: Sequence[AnswerFilter], write: Callable[[str], None]) -> None:
        self._filters = filters
        self._write = write

    def feed(self, text: str) -> None:
        """Filter a piece of the answer and write the part that may be shown."""
        for one in self._filters:
            if not (text := one.feed(text)):
                return
        self._write(text)

    def seed(self, shown: str) -> bool:
        """Begin behind text that was shown before. False: it cannot be continued, because the filters change it."""
        held = 0
        try:
            for one in self._filters:
                if (rest := one.seed(shown[: len(shown) - held])) is None:
                    return False
                held += rest
        except GuardRejection:
            return False
        if held:
            self._write = _without(held, self._write)
        return True

    def end(self) -> None:
        """Write the buffers of the filters."""
        rest = ""
        for one in self._filters:
            rest = (one.feed(rest) if rest else "") + one.end()
        if rest:
            self._write(rest)


def _without(count: int, write: Callable[[str], None]) -> Callable[[str], None]:
    """`write`, without the first characters."""

    def write_rest(text: str) -> None:
        nonlocal count
        text, count = text[count:], max(0, count - len(text))
        if text:
            write(text)

    return write_rest


def _remaining(verdicts: Iterable[Allow]) -> int | None:
    """The lowest number of remaining messages; None if no guard counts them."""
    return min((one.remaining for one in verdicts if one.remaining is not None), default=None)


def _apply(verdict: Allow, request: ChatRequest) -> ChatRequest:
    if verdict.text is not None:
        request = replace(request, contents=verdict.text)
    return request if verdict.history is None else replace(request, history=verdict.history)
