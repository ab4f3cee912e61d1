"""The account of one request: what its log line and the metrics tell about it, once, at its end."""

import asyncio
from collections.abc import Callable

import structlog
from structlog.typing import FilteringBoundLogger

from imstream.clock import time_of
from imstream.metrics import Metrics
from imstream.model import ChatRequest
from imstream.reply_buffer import ReplyBuffer
from imstream.store.replies import Beginning, Opened


class Account:
    """The facts about one request that are known here. Times are milliseconds since 1970 by the clock of Redis."""

    __slots__ = ("_loop", "_offset", "admitted_at", "backend", "ended_at", "opened_at", "sockets", "text_at")

    def __init__(self, entry_id: str) -> None:
        self.admitted_at = time_of(entry_id)
        self.opened_at: int | None = None
        """When the first attempt was opened."""
        self.text_at: int | None = None
        """When the first text could be shown."""
        self.ended_at: int | None = None
        self.backend: str | None = None
        """The backend that was called last."""
        self.sockets: tuple[int | None, int | None] = (None, None)
        """How many sockets followed the reply at its end, and how many of them were slow."""
        self._loop = asyncio.get_running_loop()
        self._offset = 0.0
        """From the loop's clock to that of Redis."""

    def open(self, opened: Opened, reply: ReplyBuffer, *, is_first: bool) -> None:
        """An attempt has been opened here, just now."""
        self._offset = opened.at - 1000 * self._loop.time()
        if is_first:
            self.opened_at = opened.at
        if self.text_at is None and reply.offset == 0:
            reply.subscribe(self._on_growth)

    @property
    def knows_beginning(self) -> bool:
        """Whether the first attempt was begun here, and not perhaps by another worker."""
        return self.opened_at is not None

    def load(self, beginning: Beginning) -> None:
        """Take over what is recorded about the beginning, unless it is known here."""
        self.opened_at = beginning.opened_at
        self.text_at = min((at for at in (self.text_at, beginning.text_at) if at is not None), default=None)

    def end(self, reply: ReplyBuffer, sockets: Callable[[ReplyBuffer], tuple[int, int]], position: str = "") -> None:
        """The end of the reply is recorded, now or at a `position` of its record, and is about to be shown."""
        reply.unsubscribe(self._on_growth)
        if self.ended_at is None:
            self.ended_at = time_of(position) if position else self._now()
            if reply.terminal is None:
                self.sockets = sockets(reply)

    def since_admission(self, at: int | None) -> int | None:
        """Milliseconds from the admission. Redis' clock may have been set back."""
        return None if at is None else max(0, at - self.admitted_at)

    def _now(self) -> int:
        return round(1000 * self._loop.time() + self._offset)

    def _on_growth(self, reply: ReplyBuffer) -> None:
        if reply.offset and self.text_at is None:
            self.text_at = self._now()
            self._loop.call_soon(reply.unsubscribe, self._on_growth)  # not while it calls its subscribers


class RequestLog:
    """Writes the line of each request that has ended on this node, and counts it."""

    def __init__(self, node: str, metrics: Metrics, sockets: Callable[[ReplyBuffer], tuple[int, int]]) -> None:
        """`sockets`: how many sockets of this node follow a reply, and how many of them are slow."""
        self.sockets = sockets
        self._node = node
        self._metrics = metrics
        self._log: FilteringBoundLogger = structlog.get_logger().bind()  # else each line would make a logger

    def begin(self, request: ChatRequest, *, stream: str) -> None:
        """Write that the first attempt at a message begins, at level debug: its end tells all of it."""
        self._log.debug("request begun", **request.ids, node=self._node, stream=stream)

    def write(self, account: Account, request: ChatRequest, reply: ReplyBuffer, *, stream: str) -> None:
        """Write about a request whose end is recorded, and which this node has removed from its stream."""
        terminal = reply.terminal
        if terminal is None:
            return  # Redis has lost its record
        usage, metrics = terminal.usage or {}, self._metrics
        waited, text, total = map(account.since_admission, (account.opened_at, account.text_at, account.ended_at))
        metrics.messages[terminal.event] += 1
        if terminal.event == "done":
            times = (metrics.queue_wait, waited), (metrics.first_delta, text), (metrics.answer, total)
            for histogram, milliseconds in times:
                if milliseconds is not None:
                    histogram.observe(milliseconds / 1000)
        sockets, slow = account.sockets
        self._log.info(
            "request ended",
            **request.ids,
            outcome=terminal.event,
            reason=terminal.reason or terminal.finish_reason,
            node=self._node,
            stream=stream,
            backend=account.backend,
            attempts=reply.fence,
            continued=reply.valid is not None,
            queue_wait_ms=waited,
            first_delta_ms=text,
            total_ms=total,
            tokens_in=usage.get("prompt_tokens"),
            tokens_out=usage.get("completion_tokens"),
            characters=reply.offset,
            sockets=sockets,
            slow_sockets=slow,
        )
