"""The time limits of AI calls, each on one timer.

connect_timeout       until the request is being sent
first_token_timeout   silence until the first token; longer for a backend that may be loading its model, or that is
                      known to send each answer as one document, and doubled after each call that exceeded it; signs
                      of life, such as comments, renew it for at most `queue_timeout`
idle_timeout          silence between tokens
total_timeout         the whole answer
"""

import asyncio
import math
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from imstream.ai.backend_options import BackendOptions
from imstream.errors import BackendError

AWAY = frozenset({"connect_timeout", "first_token_timeout"})
"""Limits that are exceeded before the answer begins: the backend is not there, or is full."""


MODEL_IDLE = timedelta(minutes=4)
"""Time without an answer after which a server may have unloaded its model (Ollama: 5 minutes)."""

_LOAD_FACTOR = 5  # of the default load timeout


class TimeLimits:
    """Cancels its block when the call as a whole, or the expected next step, takes too long.

        async with TimeLimits(total=...) as limits:
            limits.expect("first_token_timeout", within=..., at_most=...)
            limits.expect("idle_timeout", within=...)
            async for token in tokens:
                limits.renew()

    Raises `BackendError` on exit, with the reason of the exceeded limit. `renew` only stores a time, which the
    timer compares when it fires: a thousand tokens cost a thousand assignments and one timer.
    """

    def __init__(self, *, total: timedelta) -> None:
        self.catch_up: Callable[[], None] = _nothing
        """Called before silence is found too long: reads the data received while the connection paused."""
        self._loop = asyncio.get_running_loop()
        self._scope = asyncio.timeout(None)
        self._total = self._within = total.total_seconds()
        self._end = self._due = self._loop.time() + self._total
        self._reason = "total_timeout"
        self._deadline, self._deadline_reason = self._end, ("total_timeout", self._total)
        self._timer: asyncio.TimerHandle | None = None
        self._exceeded: tuple[str, float] | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._set_timer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        try:
            await self._scope.__aexit__(kind, error, traceback)
        except TimeoutError:
            assert self._exceeded is not None  # noqa: S101 - set before the scope is cancelled
            reason, seconds = self._exceeded
            raise BackendError(reason, f"after {seconds:g} s", kind="away" if reason in AWAY else "broken") from None

    def expect(self, reason: str, *, within: timedelta, at_most: timedelta | None = None) -> None:
        """Expect the next step within this time, and again after each `renew`; for `at_most` in all."""
        self._reason = reason
        self._within = within.total_seconds()
        self._deadline, self._deadline_reason = self._end, ("total_timeout", self._total)
        if at_most is not None and (end := self._loop.time() + at_most.total_seconds()) < self._end:
            self._deadline, self._deadline_reason = end, (reason, at_most.total_seconds())
        self.renew()
        if self._timer is not None and min(self._due, self._deadline) < self._timer.when():
            self._timer.cancel()
            self._set_timer()

    def renew(self) -> None:
        """The expected step has happened; its time limit starts again."""
        self._due = self._loop.time() + self._within

    def stop(self) -> None:
        """Remove all limits."""
        self.catch_up = _nothing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._timer = self._loop.call_at(min(self._due, self._deadline), self._on_timer)

    def _on_timer(self) -> None:
        now = self._loop.time()
        if now >= self._due:
            self.catch_up()
        if now >= self._deadline:
            self._exceeded = self._deadline_reason
        elif now >= self._due:
            self._exceeded = (self._reason, self._within)
        else:
            self._set_timer()
            return
        self._timer = None
        self._scope.reschedule(now)


class AnswerLimits:
    """The limits of the calls of one backend, which depend on its earlier answers."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._load_timeout = options.load_timeout or _LOAD_FACTOR * options.first_token_timeout
        self._answered_at = -math.inf
        self._used = self._grown = timedelta(0)  # the last limit of silence, and the next one if it was exceeded
        self._sends_documents = False

    def start(self) -> TimeLimits:
        """The limits of a call, which begins now."""
        return TimeLimits(total=self._options.total_timeout)

    def on_send(self, limits: TimeLimits) -> None:
        """The request is being sent."""
        options = self._options
        within = options.first_token_timeout
        if asyncio.get_running_loop().time() - self._answered_at > MODEL_IDLE.total_seconds():
            within = max(within, self._load_timeout)
        if self._sends_documents:
            within = max(within, options.queue_timeout)
        self._used = within = max(within, self._grown)
        limits.expect("first_token_timeout", within=within, at_most=max(within, options.queue_timeout))

    def on_head(self, limits: TimeLimits, *, is_document: bool) -> None:
        """The head of the response is received. A document is sent when the answer is complete."""
        if is_document:
            limits.expect("first_token_timeout", within=self._options.queue_timeout)
        else:
            limits.renew()

    def on_silence(self) -> None:
        """The first token of a call did not come in time. If the model is being loaded, the next call needs longer."""
        self._grown = min(2 * self._used, self._options.queue_timeout)

    def on_answer(self, *, is_document: bool) -> None:
        """An answer is complete."""
        self._answered_at = asyncio.get_running_loop().time()
        self._grown = timedelta(0)
        self._sends_documents = is_document


def _nothing() -> None:
    pass
