"""The account of one request: the values of its log line and of the metrics, once, at its end."""

from collections.abc import Callable

from imstream.clock import RedisClock, time_of
from imstream.logs import event_writer, sanitize
from imstream.metrics import Metrics
from imstream.model import ChatRequest
from imstream.reply_buffer import ReplyBuffer
from imstream.store.replies import Beginning


class Account:
    """The facts about one request that are known here. Times are milliseconds since 1970 by the clock of Redis."""

    __slots__ = ("_clock", "_is_open", "backend", "ended_at", "opened_at", "received_at", "sockets", "text_at")

    def __init__(self, clock: RedisClock, *, received_at: int) -> None:
        self.received_at = received_at
        self.opened_at: int | None = None  # when it was known that the first attempt is open
        self.text_at: int | None = None  # when the first text could be shown
        self.ended_at: int | None = None
        self.backend: str | None = None  # the backend that was called last
        self.sockets: tuple[int | None, int | None] = (None, None)
        """How many sockets followed the reply at its end, and how many of them were slow."""
        self._clock = clock
        self._is_open = False  # whether an attempt was opened here

    def open(self, reply: ReplyBuffer, *, is_first: bool) -> None:
        """An attempt has been opened here, just now."""
        if not self._is_open:
            self._is_open, reply.first_text_at = True, None  # it may hold the text of another worker
        if is_first:
            self.opened_at = self._clock.now()

    def load(self, beginning: Beginning) -> None:
        """Take over the recorded times of the beginning, unless they are known here."""
        self.opened_at = beginning.opened_at
        self.text_at = min((at for at in (self.text_at, beginning.text_at) if at is not None), default=None)

    def end(self, reply: ReplyBuffer, sockets: Callable[[ReplyBuffer], tuple[int, int]], position: str = "") -> None:
        """The end of the reply is recorded, now or at a `position` of its record, and is about to be shown."""
        if self.ended_at is None:
            self.ended_at = time_of(position) if position else self._clock.now()
            if self._is_open and reply.first_text_at is not None:
                self.text_at = self._clock.at(reply.first_text_at)
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
        usage, metrics, since = terminal.usage or {}, self._metrics, account.received_at
        waited, text, total = [
            None if at is None else at - since if at > since else 0  # Redis' clock may have been set back
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
