"""The reply buffer: the text of one reply in memory, between the worker that writes it and the sessions that read it.

Writers and readers never wait for each other: a fast session reads each piece, a slow one reads all that has gathered.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import SEEK_END, StringIO
from time import monotonic
from typing import NamedTuple
from weakref import WeakValueDictionary

from imstream.model import Continued, Question, Record, Terminal, Waiting
from imstream.user_ids import UserId

MAX_DELTA = 32_768
"""Maximum characters in one delta, so that frames to a slow session have a size that clients accept."""

STATUS_INTERVAL = 1.0
"""Minimum seconds between two reports of a message's place in the queue to one session."""

MAX_PIECES = 1024
"""Maximum pieces before they are joined to one. A piece of one character takes a hundred bytes."""


class Place(NamedTuple):
    """The place of a message in the queue of this node, as of the loop time `at`.

    `wait`: estimated seconds from then until the answer begins; None without an estimate. `reason`: why nothing begins.
    """

    position: int
    wait: float | None
    at: float
    reason: str | None = None

    def is_news_after(self, told: "Place") -> bool:
        """Whether to report this place after another: it has changed, or the estimate by a second and a fifth."""
        if self.at - told.at < STATUS_INTERVAL:
            return False
        if (self.position, self.reason) != (told.position, told.reason) or self.wait is None or told.wait is None:
            return (self.position, self.wait is None, self.reason) != (told.position, told.wait is None, told.reason)
        return abs(self.at + self.wait - told.at - told.wait) > max(1.0, self.wait / 5)


@dataclass(slots=True, weakref_slot=True, eq=False, repr=False)
class ReplyBuffer:
    """The text of the last attempt at one message, and its terminal event. Offsets count characters, from 0.

    Attributes:
        attempt: Its number for clients. It changes when text is discarded, or may be.
        fence: Its number in the record.
        valid: Earlier numbers for clients, and up to which offset their text is that of this attempt.
        has_job: A worker of this process has taken its request, and may open it.
        has_writer: A worker of this process writes it. Then the buffer is newer than any record.
        first_text_at: When text was first added, by the monotonic clock.
        position: Position in the reply stream up to which the record was loaded. Empty: load from the beginning.
        question: The recorded question, where it is known.
        place: Its place in the queue of this node, until it begins; None: not known.
        waiting: Why it waits for its backend; None while it does not.
        is_thinking: The model reasons, and has not begun its text.
        thoughts: Its reasoning, where it is shown. Another object when it starts again.
        is_watched: A session wants to know its state or reasoning.
    """

    user_id: UserId
    message_id: str
    attempt: int = 0
    fence: int = 0
    valid: Mapping[int, int] | None = None
    offset: int = 0
    first_text_at: float | None = None
    terminal: Terminal | None = None
    has_job: bool = False
    has_writer: bool = False
    position: str = ""
    question: Question | None = None
    place: Place | None = None
    waiting: Waiting | None = None
    is_thinking: bool = False
    thoughts: StringIO | None = None
    is_watched: bool = False
    _texts: list[str] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _subscribers: set[Callable[["ReplyBuffer"], None]] = field(default_factory=set)

    @property
    def is_queued(self) -> bool:
        """Whether the message waits for a worker, by its record."""
        return self.attempt == 0 and self.terminal is None and (self.question is not None or self.position != "")

    def queue(self, question: Question) -> None:
        """Note that the message is recorded as waiting for a worker."""
        self.question = question
        self._notify()

    def move_to(self, place: Place) -> None:
        """Set the place in the queue."""
        self.place = place
        self._notify()

    def wait(self, why: Waiting | None) -> None:
        """Note why the message waits for its backend; None: it does not."""
        if why != self.waiting:
            self.waiting = why
            self._notify()

    def think(self, reasoning: str, *, keep: bool) -> None:
        """Note that the model reasons; blanks are no reasoning. `keep`: it is shown to the sessions that want it."""
        if not self.is_thinking:
            if not reasoning.strip():
                return
            self.set_thinking(thinking=True)
        if keep and reasoning:
            self.thoughts = self.thoughts or StringIO()
            self.thoughts.seek(0, SEEK_END)
            self.thoughts.write(reasoning)
            if self.is_watched:
                self._notify()

    def set_thinking(self, *, thinking: bool) -> None:
        """Note whether the model reasons."""
        if thinking != self.is_thinking:
            self.is_thinking = thinking
            if thinking:
                self.waiting = None
            if self.is_watched:
                self._notify()

    def forget_reasoning(self) -> None:
        """Discard the reasoning of a call that failed, or of the attempt before."""
        self.is_thinking, self.thoughts = False, None

    def begin(self, attempt: int, continued: Continued | None = None) -> None:
        """Begin an attempt of this process; discard the text so far, unless it is continued."""
        self.has_writer = True
        self.position, self.terminal, self.place, self.waiting = "", None, None, None
        self._reset(attempt, continued, "" if continued is None else continued.text)

    def append(self, text: str) -> None:
        """Add a piece of text and notify the subscribers."""
        if self.first_text_at is None:
            self.first_text_at = monotonic()
        self._starts.append(self.offset)
        self._texts.append(text)
        if len(self._texts) > MAX_PIECES:
            self._texts, self._starts = ["".join(self._texts)], [0]
        self.offset += len(text)
        self.waiting, self.is_thinking = None, False
        self._notify()

    def expect_more(self) -> None:
        """Read the record again, if it ended as failed: an operator may have had it reopened."""
        if self.terminal is not None and self.terminal.event == "failed":
            self.terminal, self.has_writer, self.position = None, False, ""

    def end(self, terminal: Terminal) -> None:
        """Set the terminal event. It must be recorded before: clients see it from now on."""
        self.terminal = terminal
        self._notify()

    def load(self, record: Record) -> bool:
        """Take over a record, unless the buffer is newer. False: it continues another text; read the whole record."""
        if self.terminal is not None or (self.has_writer and record.terminal is None):
            return True
        was_queued, self.question = self.is_queued, record.question or self.question
        if record.start > 0 and (record.attempt, record.start) != (self.fence, self.offset):
            self.position = ""
            return False
        if record.start > 0:
            if record.text:
                self.append(record.text)
        elif (self.text_from(0, limit=None), self.fence) != (record.text, record.attempt):
            self._reset(record.attempt, record.continued, record.text)
        self.wait(record.waiting)
        self.set_thinking(thinking=record.thinking)
        self.position = record.position
        if self.is_queued and not was_queued:
            self._notify()
        if record.terminal is not None:
            self.end(record.terminal)
        return True

    def text_from(self, offset: int, *, limit: int | None = MAX_DELTA) -> str:
        """Return the text from `offset` on, at most `limit` characters."""
        if offset >= self.offset:
            return ""
        if offset == self._starts[-1]:  # of a session that keeps up
            text = self._texts[-1]
        else:
            index = bisect_right(self._starts, offset) - 1
            text = "".join(self._texts[index:])[offset - self._starts[index] :]
        return text if limit is None else text[:limit]

    def subscribe(self, on_change: Callable[["ReplyBuffer"], None]) -> None:
        """Call `on_change` whenever there is more to read."""
        self._subscribers.add(on_change)

    def unsubscribe(self, on_change: Callable[["ReplyBuffer"], None]) -> None:
        """Stop calling `on_change`. May be repeated."""
        self._subscribers.discard(on_change)

    def end_job(self, *, has_begun: bool) -> None:
        """Note that the job of its request has ended. If it has not begun the reply, no caller needs to wait."""
        self.has_job = False
        if not has_begun:
            self._notify()

    async def wait_until_recorded(self, seconds: float) -> bool:
        """Wait until the reply has a record: a worker has begun it, or a record was loaded.

        False after a time-out, or if its job has ended without beginning the reply.
        """
        changed = await self._wait_until(lambda: True, seconds)
        return changed and (self.has_job or self.has_writer or self.terminal is not None)

    async def wait_until_ended(self, seconds: float) -> bool:
        """Wait for the terminal event. False after a time-out."""
        return self.terminal is not None or await self._wait_until(lambda: self.terminal is not None, seconds)

    async def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a change after which the condition holds."""
        loop = asyncio.get_running_loop()
        holds: asyncio.Future[bool] = loop.create_future()

        def on_change(_: ReplyBuffer) -> None:
            if condition() and not holds.done():
                holds.set_result(True)

        def on_timeout() -> None:
            if not holds.done():
                holds.set_result(False)

        self.subscribe(on_change)
        timer = loop.call_later(seconds, on_timeout)
        try:
            return await holds
        finally:
            timer.cancel()
            self.unsubscribe(on_change)

    def holds(self, attempt: int, offset: int) -> bool:
        """Whether the text continues from a position: of this attempt, or of an earlier one that it continues.

        Clients of nodes of an older release have the attempt's number in the record.
        """
        return self.attempt <= attempt <= self.fence or offset <= (self.valid or {}).get(attempt, -1)

    def _reset(self, attempt: int, continued: Continued | None, text: str) -> None:
        self.fence = attempt
        self.forget_reasoning()
        self.attempt, self.valid = (attempt, None) if continued is None else (continued.wire, continued.valid)
        self.offset, self._texts, self._starts = len(text), [text] if text else [], [0] if text else []
        self._notify()

    def _notify(self) -> None:
        for on_change in self._subscribers:
            on_change(self)


class ReplyBuffers:
    """The reply buffers of this process, one per message. A buffer lives as long as a writer or reader holds it."""

    def __init__(self) -> None:
        self._buffers: WeakValueDictionary[tuple[UserId, str], ReplyBuffer] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._buffers)

    def get(self, user_id: UserId, message_id: str) -> ReplyBuffer:
        """Return the buffer of a message; create it if it does not exist."""
        buffer = self._buffers.get((user_id, message_id))
        if buffer is None:
            buffer = self._buffers[user_id, message_id] = ReplyBuffer(user_id, message_id)
        return buffer

    def find(self, user_id: UserId, message_id: str) -> ReplyBuffer | None:
        """Return the buffer of a message, if there is one."""
        return self._buffers.get((user_id, message_id))

    def unfinished_elsewhere(self) -> list[ReplyBuffer]:
        """Return the buffers of unfinished replies that no worker of this process writes."""
        return [buffer for buffer in self._buffers.values() if not buffer.has_writer and buffer.terminal is None]
