"""Texts that come soon after each other go together, in one call.

A call costs nearly the same for one text as for sixteen. So:

    the last call began `APART` ago or earlier    what comes in one turn of the event loop goes together, at once
    it began later than that                      what comes gathers until then, or until a batch is full
    `CALLS` are under way                         it gathers until one of them ends

So a slow call holds nobody up, unless `CALLS` of them are slow.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

CALLS = 8
"""Most calls under way at once."""

APART = 0.020
"""Least seconds between the beginnings of two calls, unless a batch is full. A text waits no longer for company."""

T = TypeVar("T")


class Batches(Generic[T]):
    """Asks about texts, several in a call."""

    def __init__(self, call: Callable[[Sequence[str]], Awaitable[Sequence[T]]], *, size: int) -> None:
        self._call = call
        self._size = size
        self._waiting: deque[tuple[str, asyncio.Future[T]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._next = 0.0
        """When the next call may begin without being full (loop time)."""

    async def ask(self, text: str) -> T:
        """What the call says about a text. Whoever is cancelled meanwhile changes nothing for the others."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._waiting.append((text, answer))
        if len(self._waiting) >= self._size:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_at(self._next, self._send)  # in the next turn, when that is over
        try:
            return await answer
        finally:
            del answer  # an error that it holds has this frame in its trace

    def answer_waiting(self, answer: T) -> None:
        """Give all whose call has not begun this answer."""
        waiting, self._waiting = self._waiting, deque()
        _give(list(waiting), [answer] * len(waiting))

    async def aclose(self) -> None:
        """Break off what is under way; nobody waits for it any more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._under_way:
            task.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._under_way) < CALLS:
            if batch := self._next_batch():
                self._under_way.add(loop.create_task(self._ask_together(batch)))
                self._next = loop.time() + APART

    def _next_batch(self) -> list[tuple[str, asyncio.Future[T]]]:
        batch = list[tuple[str, asyncio.Future[T]]]()
        while self._waiting and len(batch) < self._size:
            text, answer = self._waiting.popleft()
            if not answer.done():  # not cancelled
                batch.append((text, answer))
        return batch

    async def _ask_together(self, batch: list[tuple[str, asyncio.Future[T]]]) -> None:
        try:
            _give(batch, await self._call([text for text, _ in batch]))
        except Exception as error:  # noqa: BLE001 - for those who wait, each of whom needs a trace of its own
            _fail(batch, error)
        finally:
            _cancel(batch)  # those that have no answer, when this is broken off
            batch.clear()  # errors have this frame in their trace, and what is in it their errors
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - it is one
            self._under_way.discard(task)
            if self._timer is None:  # what waits could not be sent before
                self._send()


def _fail(batch: Sequence[tuple[str, asyncio.Future[T]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            failure = RuntimeError("the call has failed")
            failure.__cause__ = error
            future.set_exception(failure)


def _cancel(batch: Sequence[tuple[str, asyncio.Future[T]]]) -> None:
    for _, future in batch:
        future.cancel()


def _give(batch: Sequence[tuple[str, asyncio.Future[T]]], answers: Sequence[T]) -> None:
    for (_, future), answer in zip(batch, answers, strict=True):
        if not future.done():
            future.set_result(answer)
