"""What a client knows about one message, and every change of it. No I/O.

    unanswered ──accepted──▶ accepted ──done, failed, cancelled, expired──▶ ended (`result`)
        └────────────────────────┴──refused, violation, closed──▶ ended (`error`)

Whatever the server says twice is taken once; text that would be missing or repeated ends the message with
`ProtocolViolation`, so that nobody reads an answer that was never given (I5).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from imstream.client.errors import ClientError, ProtocolViolation
from imstream.wire import ClientChat, Code, Event, ResumePoint, ServerFrame


class Outcome(StrEnum):
    """How an accepted message ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Accepted:
    """The message will be answered.

    Attributes:
        position: Requests that wait for a worker up to and including this one, when the server said so; 1 is next.
    """

    position: int | None


@dataclass(frozen=True, slots=True)
class Restarted:
    """A new attempt begins: the text so far is void."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of the answer.

    Attributes:
        text: What comes after the text so far.
        attempt: The attempt it belongs to, from 1.
        restarted: The text so far is void, and this is the beginning of another attempt.
    """

    text: str
    attempt: int
    restarted: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Result:
    """How an accepted message ended.

    Attributes:
        outcome: How it ended.
        text: The answer; only when `outcome` is `done` it is known to be whole.
        attempt: The attempt the text belongs to.
        finish_reason: Why the model stopped, as the backend said it.
        usage: Tokens counted by the backend.
        why: The server's sentence for a person.
    """

    outcome: Outcome
    text: str
    attempt: int
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    why: str = ""


_OUTCOMES = {Event.DONE: Outcome.DONE, Event.FAILED: Outcome.FAILED, Event.CANCELLED: Outcome.CANCELLED}


class Message:
    """One message and what is known of its answer.

    Attributes:
        chat: The frame that asks.
        accepted: The server has promised an answer.
        position: Place in the queue as last told.
        attempt: The attempt that `pieces` belong to; 0 before the first.
        offset: Where the reply stands after `pieces`.
        pieces: Text of the attempt, in order.
        restarts: How often a reader has to be told that the text so far is void.
        repeated: Deltas that brought nothing new and were dropped.
        result: How it ended, once the server has said so.
        error: Why it ended without a word from the server about its answer.
        changed: Set at the next change, and replaced by a fresh event then.
        sent_on: The connection that last carried `chat`.
        resuming: A server was asked to go on with it and has said nothing about it since.
    """

    def __init__(self, chat: ClientChat, message_id: str) -> None:
        self.chat = chat
        self.message_id = message_id
        self.accepted = False
        self.position: int | None = None
        self.attempt = 0
        self.offset = 0
        self.pieces: list[str] = []
        self.restarts = 0
        self.repeated = 0
        self.result: Result | None = None
        self.error: ClientError | None = None
        self.changed = asyncio.Event()
        self.sent_on: object = None
        self.resuming = False

    @property
    def ended(self) -> bool:
        """Nothing more will be known."""
        return self.result is not None or self.error is not None

    @property
    def text(self) -> str:
        """The answer so far, of the latest attempt."""
        return "".join(self.pieces)

    @property
    def resume_point(self) -> ResumePoint:
        """What to tell a server that shall go on from here."""
        return ResumePoint(message_id=self.message_id, attempt=self.attempt, offset=self.offset)

    def fail(self, error: ClientError) -> None:
        """End it with an error; nothing happens when it has ended."""
        if not self.ended:
            self.error = error
            self._tell()

    def apply(self, frame: ServerFrame) -> None:
        """Take in what the server said about this message; nothing happens when it has ended."""
        if self.ended:
            return
        try:
            self._apply(frame)
        except ProtocolViolation as violation:
            self.error = violation
        self._tell()

    def _tell(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _apply(self, frame: ServerFrame) -> None:
        if not self.accepted and _goes_on(frame):
            # It was asked before under this id, told UNAVAILABLE, and is being answered all the same. This was on its
            # way when it was asked again; after `accepted` all of it comes from its beginning.
            self.repeated += 1
            return
        self.accepted = True
        self.resuming = False
        if frame.event is Event.ACCEPTED:
            self.position = frame.position
        elif frame.event is Event.DELTA:
            self._append(frame)
        elif frame.event is Event.RESTART:
            self._restart(frame)
        elif frame.event in _OUTCOMES:
            self._finish(frame, _OUTCOMES[frame.event])
        elif frame.code is Code.EXPIRED:
            self.result = Result(Outcome.EXPIRED, self.text, self.attempt, why=frame.contents or "")
        else:
            raise self._violation(frame, "it has neither an event nor a code that ends the message")

    def _append(self, frame: ServerFrame) -> None:
        text = frame.contents or ""
        if frame.attempt is None or frame.offset is None:
            raise self._violation(frame, "it has no attempt or no offset")
        if frame.attempt < self.attempt:
            self.repeated += 1
            return
        if frame.attempt > self.attempt:
            self._begin(frame.attempt, told=self.attempt > 0)
        start = frame.offset - len(text)  # offsets count Unicode code points
        if start == self.offset:
            self.pieces.append(text)
            self.offset = frame.offset
        elif frame.offset <= self.offset:
            self.repeated += 1
        else:
            raise self._violation(frame, f"it begins at {start}, the text known ends at {self.offset}")

    def _restart(self, frame: ServerFrame) -> None:
        if frame.attempt is None:
            raise self._violation(frame, "it has no attempt")
        if frame.attempt > self.attempt or (frame.attempt == self.attempt and self.offset):
            self._begin(frame.attempt, told=True)

    def _begin(self, attempt: int, *, told: bool) -> None:
        self.restarts += told
        self.attempt = attempt
        self.offset = 0
        self.pieces = []

    def _finish(self, frame: ServerFrame, outcome: Outcome) -> None:
        if frame.attempt is not None and frame.attempt > self.attempt:
            self._begin(frame.attempt, told=self.attempt > 0)
        # What was cancelled or given up may have been shown further than it was recorded; a whole answer may not.
        if outcome is Outcome.DONE and frame.offset not in (None, self.offset):
            raise self._violation(frame, f"the answer ends at {frame.offset}, the text known ends at {self.offset}")
        self.result = Result(
            outcome, self.text, self.attempt, frame.finish_reason, frame.usage, why=frame.contents or ""
        )

    def _violation(self, frame: ServerFrame, problem: str) -> ProtocolViolation:
        kind = frame.event or frame.code
        return ProtocolViolation(f"{kind} for message {self.message_id}, attempt {frame.attempt}: {problem}")


def _goes_on(frame: ServerFrame) -> bool:
    """Whether a frame comes after text that was told before."""
    told_before = (frame.offset or 0) - len(frame.contents or "" if frame.event is Event.DELTA else "")
    return frame.event in (Event.DELTA, Event.DONE) and told_before > 0
