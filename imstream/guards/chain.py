"""All guards of a node, asked one after the other. Only those are asked that have something to say at the moment."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import structlog

from imstream import guards as folder
from imstream.errors import StoreError
from imstream.guards.guard import (
    Allow,
    AnswerFilter,
    Guard,
    GuardDeps,
    GuardRejection,
    Handshake,
    LoginAttempt,
    Reject,
    overrides,
)
from imstream.logs import LIMITED
from imstream.model import ChatRequest

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


@dataclass(frozen=True, slots=True)
class LoginAccepted:
    """A user may come in: until when, in seconds since 1970, and how many chats are left today."""

    until: float | None = None
    remaining: int | None = None


@dataclass(frozen=True, slots=True)
class ChatAllowed:
    """A message may be admitted, as `request`. If it is not, `undo` takes back what that has cost."""

    request: ChatRequest
    remaining: int | None
    passes: Sequence[Allow]

    async def undo(self) -> None:
        """Take back what the guards have counted. Without Redis it stays counted."""
        for one in self.passes:
            if one.undo is not None:
                try:
                    await one.undo()
                except StoreError as error:
                    log.warning("a refused message stays counted", user=self.request.user_id, error=str(error))


class GuardChain:
    """The guards of one node. An async context manager: inside it they are at work."""

    def __init__(self, guards: Iterable[Guard] = ()) -> None:
        self._all = sorted(guards, key=lambda guard: guard.order)
        self._handshake = self._at("handshake")
        self._login = self._at("login")
        self._stay = self._at("stay")
        self._chat = self._at("chat")
        self._request = self._at("request")
        self._answer = self._at("answer")
        self._violated = self._at("violated")
        self._failed = self._at("failed")
        self._stack = AsyncExitStack()
        self.refused = Counter[str]()
        """What was refused since the start, by reason."""

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self:
        """All guards that the settings ask for. Raises `SettingsError`."""
        made = (guard.make(supplies) for guard in all_guards())
        return cls(guard for guard in made if guard is not None)

    def __iter__(self) -> Iterator[Guard]:
        return iter(self._all)

    async def __aenter__(self) -> Self:
        for guard in self._all:
            await self._stack.enter_async_context(guard)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    async def reload(self) -> list[str]:
        """Have all guards read again what they have from elsewhere; what that is."""
        reloaded = list[str]()
        for guard in self._all:
            try:
                what = await guard.reload()
            except Exception:
                log.exception("not reloaded", guard=type(guard).__name__)
            else:
                reloaded += [] if what is None else [what]
        return reloaded

    def handshake(self, handshake: Handshake) -> Reject | None:
        """Whether a socket may be opened."""
        for guard in self._handshake:
            if (refusal := guard.handshake(handshake)) is not None:
                self.refused[refusal.reason] += 1
                return refusal
        return None

    async def login(self, login: LoginAttempt) -> LoginAccepted | Reject:
        """Whether a user may come in. Raises `StoreError`."""
        until, remaining = list[float](), list[int]()
        for guard in self._login:
            verdict = await guard.login(login)
            if isinstance(verdict, Reject):
                self.refused[verdict.reason] += 1
                limited.info("login refused", reason=verdict.reason, user=login.user_id, peer=login.peer)
                return verdict
            if verdict.until is not None:
                until.append(verdict.until)
            if verdict.remaining is not None:
                remaining.append(verdict.remaining)
        return LoginAccepted(min(until, default=None), min(remaining, default=None))

    async def stay(self, user_id: int) -> Reject | None:
        """Whether a user who has come in may stay. Raises `StoreError`."""
        for guard in self._stay:
            if (refusal := await guard.stay(user_id)) is not None:
                return refusal
        return None

    async def chat(self, request: ChatRequest) -> ChatAllowed | Reject:
        """Whether a message may be admitted. Raises `StoreError`."""
        passes = list[Allow]()
        for guard in self._chat:
            verdict = await guard.chat(request)
            if isinstance(verdict, Reject):
                await ChatAllowed(request, None, passes).undo()
                await self.note(verdict, request)
                return verdict
            request = _changed(request, verdict)
            passes.append(verdict)
        remaining = [one.remaining for one in passes if one.remaining is not None]
        return ChatAllowed(request, min(remaining, default=None), passes)

    async def request(self, request: ChatRequest) -> ChatRequest:
        """What is to be asked. Raises `GuardRejection` when nothing is, `BackendError` when that cannot be told now."""
        for guard in self._request:
            verdict = await guard.request(request)
            if isinstance(verdict, Reject):
                await self.note(verdict, request)
                raise GuardRejection(verdict)
            request = _changed(request, verdict)
        return request

    def answer(self, request: ChatRequest, write: Callable[[str], None]) -> Filtered | None:
        """What stands between the AI and `write` during one attempt; None: nothing does."""
        filters = [one for guard in self._answer if (one := guard.answer(request)) is not None]
        return Filtered(filters, write) if filters else None

    async def failed(self, request: ChatRequest) -> None:
        """A request has ended as failed: see `Guard.failed`. Raises `StoreError`; may be told again."""
        for guard in self._failed:
            await guard.failed(request)

    async def note(self, verdict: Reject, request: ChatRequest) -> None:
        """Count and log that a guard has refused a message, or the answer to it; tell those who want to know."""
        self.refused[verdict.reason] += 1
        # Violations are few: they lock the account. Of others, such as those for too many messages, there is no end.
        note = log.info if verdict.violation else limited.info
        note(
            "message refused",
            reason=verdict.reason,
            user=request.user_id,
            message_id=request.message_id,
            trace=request.trace,
            **({"detail": verdict.detail} if verdict.detail else {}),
        )
        if verdict.violation:
            for guard in self._violated:
                await guard.violated(request.user_id)

    def _at(self, moment: str) -> list[Guard]:
        return [guard for guard in self._all if overrides(guard, moment)]


class Filtered:
    """Passes an answer on, through all who listen to it."""

    def __init__(self, filters: Sequence[AnswerFilter], write: Callable[[str], None]) -> None:
        self._filters = filters
        self._write = write

    def feed(self, text: str) -> None:
        """Take a piece of the answer. Raises `GuardRejection`."""
        for one in self._filters:
            if not (text := one.feed(text)):
                return
        self._write(text)

    def end(self) -> None:
        """Write what was held back. Raises `GuardRejection`."""
        rest = ""
        for one in self._filters:
            rest = (one.feed(rest) if rest else "") + one.end()
        if rest:
            self._write(rest)


def all_guards() -> list[type[Guard]]:
    """Every guard there is: the subclasses of `Guard` in the modules of this folder."""
    modules = [
        importlib.import_module(f"{folder.__name__}.{one.name}") for one in pkgutil.iter_modules(folder.__path__)
    ]
    return [
        one
        for module in modules
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, Guard) and one.__module__ == module.__name__ and one is not Guard
    ]


def _changed(request: ChatRequest, verdict: Allow) -> ChatRequest:
    if verdict.text is not None:
        request = replace(request, contents=verdict.text)
    return request if verdict.history is None else replace(request, history=verdict.history)
