"""The answer to one message: its state, every transition of it, and how it is read. No I/O.

    unanswered ──accepted──▶ accepted ──done, failed, cancelled, expired──▶ ended (with a result)
        └────────────────────────┴──refused, violation, closed──▶ ended (with an error)

A reply that failed may continue: an operator retries the message, and a later attempt answers it.

Repeated text is dropped. Text that is missing or contradicts the known text ends the reply with `ProtocolViolation`, so
that no reader gets an answer that was never given (I5).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from imstream.client.errors import Cancelled, ClientError, Expired, Failed, ProtocolViolation
from imstream.codes import Code, Event, State
from imstream.wire import ClientChat, ReceivedFrame, ResumePoint


class Outcome(StrEnum):
    """How an accepted message ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Receipt(StrEnum):
    """The result of a request to cancel."""

    CANCELLED = "cancelled"
    """The answer was stopped; the text so far stays."""
    TOO_LATE = "too_late"
    """The answer had ended already."""
    UNKNOWN = "unknown"
    """The server has no such message of this user."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The message will be answered. `position`: its place in the queue if the server sent one; 1 is next."""

    position: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """The state of an unfinished message, for clients that want `status`; a text for one of a newer server."""

    state: State | str
    position: int | None
    eta: timedelta | None
    reason: str | None
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Thinking:
    """The reasoning of the model so far, for clients that want `thinking`. It does not belong to the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """A new attempt has begun: discard the text so far."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of the answer. `attempt` counts from 1; with `restarted`, discard the text before this piece."""

    text: str
    attempt: int
    restarted: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Result:
    """How an accepted message ended.

    Attributes:
        text: The answer of this `attempt`; complete only if `outcome` is `done`.
        finish_reason: Why the model stopped, as reported by the backend.
        usage: Token counts of the backend.
        why: The server's message for a person.
    """

    outcome: Outcome
    text: str
    attempt: int
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    why: str = ""


ReplyEvent = Accepted | Status | Thinking | Restarted | Piece | Result

_ENDS = frozenset({Event.DONE, Event.FAILED, Event.CANCELLED})

_ANSWERS = frozenset({Event.RESTART, Event.DELTA, *_ENDS})

_OPTIONAL = frozenset({Event.STATUS, Event.THINKING})

_EVENTS = frozenset({None, Event.ACCEPTED, *_OPTIONAL, *_ANSWERS})

_ERRORS = {Outcome.FAILED: Failed, Outcome.CANCELLED: Cancelled, Outcome.EXPIRED: Expired}


class Reply:
    """The answer to one message while it is received; returned by `Client.send`.

    A reply that is not read costs only the memory of its text; a slow reader gets fewer, larger pieces. A reply can be
    read by several readers, and again from the beginning.

    `accepted`, `result`, `text`, `events` and iteration raise `Refused` if the server did not accept the message, and
    another `ClientError` if the session ended or the server violated the protocol. `text` and iteration also raise
    `Unanswered` if the answer failed, was cancelled or has expired.

    Attributes:
        position: The last place in the queue that the server sent; 1 is next.
        status: The last status that the server sent, if the client wants `status`.
        thinking: The reasoning so far, if the client wants `thinking`.
        attempt: The attempt that `so_far` belongs to; 0 before the first.
        offset: Length of `so_far` in code points.
        repeated: Number of frames that were dropped because their text was known. A correct server causes none.
        frame: The CHAT frame of the question.
        sent_on: The last connection that carried `frame`.
        is_accepted: The server has accepted the message.
        resuming: The server was asked to resume the message and has not answered yet.
        is_moved: A server could not take the message now; it is sent again on another connection, once.
    """

    def __init__(self, frame: ClientChat, message_id: str, cancel: Callable[[str], Awaitable[Receipt]]) -> None:
        self.message_id = message_id
        self.position: int | None = None
        self.status: Status | None = None
        self.thinking = ""
        self.attempt = 0
        self.offset = 0
        self.repeated = 0
        self.frame = frame
        self.sent_on: object = None
        self.is_accepted = False
        self.resuming = False
        self.is_moved = False
        self._cancel = cancel
        self._pieces: list[str] = []
        self._restarts = 0  # of attempts that had shown text
        self._result: Result | None = None
        self._error: ClientError | None = None
        self._changed = asyncio.Event()  # replaced by a new one at each change

    @property
    def so_far(self) -> str:
        """The answer so far, of the latest attempt."""
        return "".join(self._pieces)

    @property
    def ended(self) -> bool:
        """Whether the reply has a result or an error."""
        return self._result is not None or self._error is not None

    @property
    def has_failed(self) -> bool:
        """Whether the message could not be answered."""
        return self._result is not None and self._result.outcome is Outcome.FAILED

    def is_reopened_by(self, frame: ReceivedFrame) -> bool:
        """Whether a frame is of a later attempt, after this reply has failed."""
        return self.has_failed and frame.event in _ANSWERS and (frame.attempt or 0) > self.attempt

    @property
    def resume_point(self) -> ResumePoint:
        """Where a server continues the answer."""
        return ResumePoint(message_id=self.message_id, attempt=self.attempt, offset=self.offset)

    async def accepted(self) -> int | None:
        """Wait until the server accepts the message; returns the place in the queue."""
        while not self.is_accepted:
            await self._change()
        return self.position

    async def result(self) -> Result:
        """Wait for the end of the answer, whatever its outcome."""
        while self._result is None:
            await self._change()
        return self._result

    async def text(self) -> str:
        """Wait for the complete answer."""
        return _complete_text(await self.result())

    async def events(self) -> AsyncIterator[ReplyEvent]:
        """All events of the message from the beginning, as they happen; the last one is the `Result`.

        Events are derived from the state, not from a log of frames, so that no queue can grow.
        """
        has_accepted, status, thinking, restarts, read = False, None, "", 0, 0
        while True:
            if self.is_accepted and not has_accepted:
                has_accepted = True
                yield Accepted(self.position)
            elif self.status is not None and status is not self.status:
                yield (status := self.status)
            elif restarts != self._restarts:
                thinking, restarts, read = "", self._restarts, 0
                yield Restarted(self.attempt)
            elif self.thinking not in {"", thinking}:
                yield Thinking(thinking := self.thinking)
            elif read < len(self._pieces):
                text, read = "".join(self._pieces[read:]), len(self._pieces)
                yield Piece(text, self.attempt)
            elif self._result is not None:
                yield self._result
                return
            else:
                await self._change()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The text as it is received. A piece with `restarted` discards all pieces before it."""
        restarted = False
        async for event in self.events():
            if isinstance(event, Restarted):
                restarted = True
            elif isinstance(event, Piece):
                yield Piece(event.text, event.attempt, restarted)
                restarted = False
            elif isinstance(event, Result):
                _complete_text(event)

    async def cancel(self) -> Receipt:
        """Stop the answer; see `Client.cancel`."""
        return await self._cancel(self.message_id)

    async def _change(self) -> None:
        """Wait for the next change; raises the error of a reply that ended with one."""
        if self._error is not None:
            raise self._error
        await self._changed.wait()

    def fail(self, error: ClientError) -> None:
        """End the reply with an error, unless it has ended."""
        if not self.ended:
            self._error = error
            self._notify()

    def apply(self, frame: ReceivedFrame) -> None:
        """Apply a frame about this message, unless the reply has ended or the event is one of a newer server."""
        if self.is_reopened_by(frame):
            self._result = None
        if self.ended or frame.event not in _EVENTS:
            return
        try:
            self._apply(frame)
        except ProtocolViolation as violation:
            self._error = violation
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _apply(self, frame: ReceivedFrame) -> None:
        if not self.is_accepted and _continues_text(frame):
            # The same id was sent before, refused with UNAVAILABLE and recorded all the same. This frame was in flight
            # when the message was sent again; the whole answer follows after `accepted`.
            self.repeated += 1
            return
        if frame.event in _OPTIONAL:
            self._inform(frame)
            return
        self.is_accepted = True
        self.resuming = False
        if frame.event is Event.ACCEPTED:
            self._accept(frame)
        elif frame.event is Event.DELTA:
            self._append(frame)
        elif frame.event is Event.RESTART:
            self.thinking = ""
            if frame.attempt is None:
                raise self._violation(frame, "it has no attempt")
            if frame.attempt > self.attempt or (frame.attempt == self.attempt and self.offset):
                self._begin(frame.attempt, restarted=True)
        elif frame.event in _ENDS:
            self._finish(frame, Outcome(frame.event))
        elif frame.code is Code.EXPIRED:
            self._result = Result(Outcome.EXPIRED, self.so_far, self.attempt, why=frame.contents or "")
        else:
            raise self._violation(frame, "it has neither an event nor a code that ends the message")

    def _accept(self, frame: ReceivedFrame) -> None:
        self.position = frame.position
        if self.offset:  # the message was sent again while its answer began: all of it follows
            self._begin(self.attempt, restarted=True)

    def _inform(self, frame: ReceivedFrame) -> None:
        def span(ms: int | None) -> timedelta | None:
            return None if ms is None else timedelta(milliseconds=ms)

        if frame.event is Event.THINKING:
            self.thinking = (self.thinking if frame.start else "") + (frame.contents or "")
        else:
            times = span(frame.eta_ms), span(frame.retry_after_ms)
            self.status = Status(frame.state or "", frame.position, times[0], frame.reason, times[1])

    def _append(self, frame: ReceivedFrame) -> None:
        text = frame.contents or ""
        if frame.attempt is None or frame.offset is None:
            raise self._violation(frame, "it has no attempt or no offset")
        if frame.attempt < self.attempt:
            self.repeated += 1
            return
        if frame.attempt > self.attempt:
            self._begin(frame.attempt, restarted=self.attempt > 0)
        start = frame.offset - len(text)  # offsets count Unicode code points
        if start == self.offset:
            self._pieces.append(text)
            self.offset = frame.offset
        elif frame.offset <= self.offset:
            self.repeated += 1
        else:
            raise self._violation(frame, f"it begins at {start}, the text known ends at {self.offset}")

    def _begin(self, attempt: int, *, restarted: bool) -> None:
        self._restarts += restarted
        self.attempt = attempt
        self.offset = 0
        self._pieces = []

    def _finish(self, frame: ReceivedFrame, outcome: Outcome) -> None:
        if frame.attempt is not None and frame.attempt > self.attempt:
            self._begin(frame.attempt, restarted=self.attempt > 0)
        # A failed or cancelled answer may have been shown further than it was recorded; a complete one may not.
        if outcome is Outcome.DONE and frame.offset not in (None, self.offset):
            raise self._violation(frame, f"the answer ends at {frame.offset}, the text known ends at {self.offset}")
        why = frame.contents or ""
        self._result = Result(outcome, self.so_far, self.attempt, frame.finish_reason, frame.usage, why)

    def _violation(self, frame: ReceivedFrame, problem: str) -> ProtocolViolation:
        kind = frame.event or frame.code
        return ProtocolViolation(f"{kind} for message {self.message_id}, attempt {frame.attempt}: {problem}")


def _continues_text(frame: ReceivedFrame) -> bool:
    """Whether a frame presupposes text that was sent before."""
    start = (frame.offset or 0) - len(frame.contents or "" if frame.event is Event.DELTA else "")
    return frame.event in (Event.DELTA, Event.DONE) and start > 0


def _complete_text(result: Result) -> str:
    if result.outcome is Outcome.DONE:
        return result.text
    raise _ERRORS[result.outcome](result.why or result.outcome.value, result.text)
