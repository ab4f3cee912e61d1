"""Groups texts that arrive at about the same time into one call, which costs little more than a call for one text.

the last call began `MIN_INTERVAL` ago or earlier   texts of one turn of the event loop are sent together, at once
the last call began later                           texts are collected until then, or until the batch is full
`MAX_CALLS` calls are running                       texts are collected until one of them ends
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar, cast

MAX_CALLS = 8  # at the same time
MIN_INTERVAL = 0.020  # seconds between the starts of two calls, unless a batch is full: bounds the delay

T = TypeVar("T")


class Batcher(Generic[T]):
    """Submits texts to `call`, at most `size` at a time."""

    def __init__(self, call: Callable[[Sequence[str]], Awaitable[Sequence[T]]], *, size: int) -> None:
        self._call = call
        self._size = size
        self._queue: deque[tuple[str, asyncio.Future[T]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._next_start = 0.0  # of a call that is not full (loop time)

    async def submit(self, text: str) -> T:
        """The result for a text. Cancelling does not affect other texts of the same call."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._queue.append((text, result))
        if len(self._queue) >= self._size:
            self._start_calls()
        elif self._timer is None:
            self._timer = loop.call_at(self._next_start, self._start_calls)  # if in the past: in the next turn
        try:
            return await result
        finally:
            del result  # breaks a reference cycle: its exception has a traceback with this frame

    def resolve_queued(self, result: T) -> None:
        """Give this result to all texts whose call has not started."""
        while self._queue:
            _, future = self._queue.popleft()
            if not future.done():
                future.set_result(result)

    async def aclose(self) -> None:
        """Cancel all calls. No caller may be waiting for a result."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._calls:
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)

    def _start_calls(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._queue and len(self._calls) < MAX_CALLS:
            batch = list[tuple[str, asyncio.Future[T]]]()
            while self._queue and len(batch) < self._size:
                text, future = self._queue.popleft()
                if not future.done():  # cancelled
                    batch.append((text, future))
            if batch:
                self._calls.add(loop.create_task(self._run(batch)))
                self._next_start = loop.time() + MIN_INTERVAL

    async def _run(self, batch: list[tuple[str, asyncio.Future[T]]]) -> None:
        try:
            results = await self._call([text for text, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:  # noqa: BLE001 - passed on to all texts
            _fail(batch, error)  # a function, whose frame is in no traceback and so in no reference cycle
        finally:
            while batch:  # emptied to break reference cycles: exceptions have tracebacks with this frame
                batch.pop()[1].cancel()  # has no result yet if the call is cancelled
            self._calls.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            if self._timer is None:  # texts may be waiting because too many calls were running
                self._start_calls()


def _fail(batch: Sequence[tuple[str, asyncio.Future[T]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            failure = RuntimeError("the call has failed")  # one each: a traceback is part of the exception
            failure.__cause__ = error
            future.set_exception(failure)
