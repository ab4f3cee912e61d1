"""The time limits of one AI call, on one timer."""

import asyncio
from datetime import timedelta
from types import TracebackType
from typing import Self

from imstream.errors import FailureKind, TransientBackendError

AWAY = frozenset({"connect_timeout", "first_token_timeout"})
"""Limits that are exceeded before the answer begins: the backend is not there, or is full."""


class TimeLimits:
    """Cancels its block when the call as a whole, or the expected next step, takes too long.

        async with TimeLimits(total=...) as limits:
            limits.expect("first_token_timeout", within=..., at_most=...)
            limits.expect("idle_timeout", within=...)
            async for token in tokens:
                limits.renew()

    Raises `TransientBackendError` on exit, with the reason of the exceeded limit. `renew` only stores a time, which the
    timer compares when it fires: a thousand tokens cost a thousand assignments and one timer.
    """

    def __init__(self, *, total: timedelta) -> None:
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
            raise TransientBackendError(reason, f"after {seconds:g} s", kind=_kind(reason)) from None

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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._timer = self._loop.call_at(min(self._due, self._deadline), self._on_timer)

    def _on_timer(self) -> None:
        now = self._loop.time()
        if now >= self._deadline:
            self._exceeded = self._deadline_reason
        elif now >= self._due:
            self._exceeded = (self._reason, self._within)
        else:
            self._set_timer()
            return
        self._timer = None
        self._scope.reschedule(now)


def _kind(reason: str) -> FailureKind:
    return "away" if reason in AWAY else "broken"
