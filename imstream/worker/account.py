"""The account of one request: the values of its log line and of the metrics, once, at its end."""

from collections.abc import Callable
from time import monotonic

from imstream.clock import time_of
from imstream.logs import event_writer, sanitize
from imstream.metrics import Metrics
from imstream.model import ChatRequest
from imstream.reply_buffer import ReplyBuffer
from imstream.store.replies import Beginning, Opened


class Account:
    """The facts about one request that are known here. Times are milliseconds since 1970 by the clock of Redis."""

    __slots__ = ("_ahead", "backend", "ended_at", "entry_id", "opened_at", "sockets", "text_at")

    def __init__(self, entry_id: str) -> None:
        self.entry_id = entry_id
        self.opened_at: int | None = None
        """When the first attempt was opened."""
        self.text_at: int | None = None
        """When the first text could be shown."""
        self.ended_at: int | None = None
        self.backend: str | None = None
        """The backend that was called last."""
        self.sockets: tuple[int | None, int | None] = (None, None)
        """How many sockets followed the reply at its end, and how many of them were slow."""
        self._ahead = 0.0
        """By how much Redis' clock is ahead of the monotonic one, in milliseconds; 0 before an attempt is opened."""

    def open(self, opened: Opened, reply: ReplyBuffer, *, is_first: bool) -> None:
        """An attempt has been opened here, just now."""
        if not self._ahead:
            reply.first_text_at = None  # it may hold the text of another worker
        self._ahead = opened.at - 1000 * monotonic()
        if is_first:
            self.opened_at = opened.at

    def load(self, beginning: Beginning) -> None:
        """Take over the recorded times of the beginning, unless they are known here."""
        self.opened_at = beginning.opened_at
        self.text_at = min((at for at in (self.text_at, beginning.text_at) if at is not None), default=None)

    def end(self, reply: ReplyBuffer, sockets: Callable[[ReplyBuffer], tuple[int, int]], position: str = "") -> None:
        """The end of the reply is recorded, now or at a `position` of its record, and is about to be shown."""
        if self.ended_at is None:
            self.ended_at = time_of(position) if position else int(1000 * monotonic() + self._ahead)
            if self._ahead and reply.first_text_at is not None:
                self.text_at = int(1000 * reply.first_text_at + self._ahead)
            if reply.terminal is None:
                self.sockets = sockets(reply)


class RequestLog:
    """Writes the line of each request that has ended on this node, and counts it."""

    def __init__(self, node: str, metrics: Metrics, sockets: Callable[[ReplyBuffer], tuple[int, int]]) -> None:
        """`sockets`: how many sockets of this node follow a reply, and how many of them are slow."""
        self.sockets = sockets
        self._node = node
        self._metrics = metrics
        self._begun = event_writer("request begun", "debug")
        self._ended = event_writer("request ended")

    def begin(self, request: ChatRequest, *, stream: str) -> None:
        """Write that the first attempt at a message begins, at level debug: its end has all fields."""
        if self._begun is not None:
            self._begun({**request.ids, "node": self._node, "stream": stream})

    def write(self, account: Account, request: ChatRequest, reply: ReplyBuffer, *, stream: str) -> None:
        """Write about a request whose end is recorded, and which this node has removed from its stream."""
        terminal = reply.terminal
        if terminal is None:
            return  # Redis has lost its record
        usage, metrics, admitted_at = terminal.usage or {}, self._metrics, time_of(account.entry_id)
        waited, text, total = [
            None if at is None else at - admitted_at if at > admitted_at else 0  # Redis' clock may have been set back
            for at in (account.opened_at, account.text_at, account.ended_at)
        ]
        metrics.messages[terminal.event] += 1
        if terminal.event == "done":
            times = (metrics.queue_wait, waited), (metrics.first_delta, text), (metrics.answer, total)
            for histogram, milliseconds in times:
                if milliseconds is not None:
                    histogram.observe(milliseconds / 1000)
        if self._ended is None:
            return
        sockets, slow = account.sockets
        reason = terminal.reason or terminal.finish_reason
        self._ended({
            "user": request.user_id,
            "message_id": request.message_id,
            "trace": request.trace,
            "outcome": terminal.event,
            "reason": None if reason is None else sanitize(reason),
            "node": self._node,
            "stream": stream,
            "backend": account.backend,
            "attempts": reply.fence,
            "continued": reply.valid is not None,
            "queue_wait_ms": waited,
            "first_delta_ms": text,
            "total_ms": total,
            "tokens_in": usage.get("prompt_tokens"),
            "tokens_out": usage.get("completion_tokens"),
            "characters": reply.offset,
            "sockets": sockets,
            "slow_sockets": slow,
        })  # fmt: skip
