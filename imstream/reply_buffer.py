"""The reply buffer: what this process knows of the replies that somebody here writes or follows.

A worker appends text; sessions read it from where they stand. Nobody waits for anybody: a fast session gets each piece,
a slow one gets all that has gathered, and a buffer lives as long as somebody holds it and no longer.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

from imstream.model import Record, Terminal

MAX_DELTA = 32_768
"""Most characters in one delta, so that a frame to a slow session stays of a size that clients take."""

MAX_PIECES = 1024
"""Maximum pieces that a text is kept in. A piece of one character takes a hundred bytes."""


class ReplyBuffer:
    """The text of the last attempt at one message, and its end. Offsets count characters of that text, from 0."""

    __slots__ = (
        "__weakref__",
        "_starts",
        "_texts",
        "_watchers",
        "attempt",
        "has_writer",
        "message_id",
        "offset",
        "position",
        "terminal",
        "user_id",
    )

    def __init__(self, user_id: int, message_id: str) -> None:
        self.user_id = user_id
        self.message_id = message_id
        self.attempt = 0
        self.offset = 0
        self.terminal: Terminal | None = None
        self.has_writer = False
        """Whether a worker in this process writes it: then what it holds is newer than any record."""
        self.position = ""
        """Up to where the record was taken over; it is read on from here. Empty: from its beginning."""
        self._texts: list[str] = []
        self._starts: list[int] = []
        self._watchers: set[Callable[[ReplyBuffer], None]] = set()

    def begin(self, attempt: int) -> None:
        """A worker here begins an attempt: the text so far is discarded."""
        self.has_writer = True
        self.attempt = attempt
        self.position = ""
        self.terminal = None
        self._clear()

    def append(self, text: str) -> None:
        """Add a piece of the answer and wake who follows."""
        self._starts.append(self.offset)
        self._texts.append(text)
        if len(self._texts) > MAX_PIECES:
            self._texts[:] = ["".join(self._texts)]
            self._starts[:] = [0]
        self.offset += len(text)
        self._wake()

    def end(self, terminal: Terminal) -> None:
        """Set the terminal event. It is recorded already: clients must not see it before."""
        self.terminal = terminal
        self._wake()

    def load(self, record: Record) -> bool:
        """Take over what is recorded, unless a worker here knows better.

        False when the record goes on from a text that is not the one held here: it must be read from its beginning.
        """
        if self.terminal is not None or (self.has_writer and record.terminal is None):
            return True
        if record.start > 0 and (record.attempt, record.start) != (self.attempt, self.offset):
            self.position = ""
            return False
        if record.start == 0 and (self.text_from(0, limit=None), self.attempt) != (record.text, record.attempt):
            self.attempt = record.attempt
            self._clear()
        if self.offset < record.start + len(record.text):
            self.append(record.text)
        self.position = record.position
        if record.terminal is not None:
            self.end(record.terminal)
        return True

    def release(self) -> None:
        """The worker here leaves it to another: from now on, the record knows better."""
        self.has_writer = False

    def text_from(self, offset: int, *, limit: int | None = MAX_DELTA) -> str:
        """The text from `offset` on, up to about `limit` characters: whole pieces, but at least one."""
        if offset >= self.offset:
            return ""
        index = bisect_right(self._starts, offset) - 1
        if index == len(self._texts) - 1:
            text = self._texts[index][offset - self._starts[index] :]
        else:
            text = "".join(self._texts[index:])[offset - self._starts[index] :]
        return text if limit is None else text[:limit]

    def subscribe(self, wake: Callable[[ReplyBuffer], None]) -> None:
        """Call `wake` with this reply whenever there is more to read."""
        self._watchers.add(wake)

    def unsubscribe(self, wake: Callable[[ReplyBuffer], None]) -> None:
        """Stop calling `wake`."""
        self._watchers.discard(wake)

    async def wait_until_recorded(self, seconds: float) -> bool:
        """Wait until there is a record of it: a worker here has begun it, or has found it. False when none does so."""
        woken = asyncio.Event()

        def wake(_: ReplyBuffer) -> None:
            woken.set()

        self.subscribe(wake)
        try:
            async with asyncio.timeout(seconds):
                await woken.wait()
        except TimeoutError:
            return False
        finally:
            self.unsubscribe(wake)
        return True

    def _clear(self) -> None:
        self.offset = 0
        self._texts.clear()
        self._starts.clear()
        self._wake()

    def _wake(self) -> None:
        for wake in self._watchers:
            wake(self)


class ReplyBuffers:
    """The replies of this process, one object for each message, shared by its writer and its followers."""

    def __init__(self) -> None:
        self._replies: WeakValueDictionary[tuple[int, str], ReplyBuffer] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, user_id: int, message_id: str) -> ReplyBuffer:
        """The reply to a message. It is kept as long as the caller, or anybody else, holds it."""
        key = (user_id, message_id)
        reply = self._replies.get(key)
        if reply is None:
            reply = self._replies[key] = ReplyBuffer(user_id, message_id)
        return reply

    def find(self, user_id: int, message_id: str) -> ReplyBuffer | None:
        """The reply to a message, if anybody here holds it."""
        return self._replies.get((user_id, message_id))

    def unfinished_elsewhere(self) -> list[ReplyBuffer]:
        """The replies that are followed here and written elsewhere, or by nobody yet."""
        return [reply for reply in self._replies.values() if not reply.has_writer and reply.terminal is None]


@dataclass(frozen=True, slots=True)
class TextReset:
    """Another attempt has begun; the text so far is void."""

    attempt: int


class TextGrown(NamedTuple):  # made for nearly every frame, in a third of the time of a frozen dataclass
    """The text went on; `offset` is where it stands after it."""

    attempt: int
    text: str
    offset: int


@dataclass(frozen=True, slots=True)
class ReplyEnded:
    """The reply has ended and everything before was read."""

    attempt: int
    offset: int
    terminal: Terminal


class Cursor:
    """How far one session has read one reply."""

    __slots__ = ("attempt", "offset", "reply")

    def __init__(self, reply: ReplyBuffer, *, attempt: int = 0, offset: int = 0) -> None:
        self.reply = reply
        self.attempt = attempt
        self.offset = offset

    @property
    def has_more(self) -> bool:
        """Whether the next `advance` will tell anything, right after one that did."""
        return self.offset < self.reply.offset or self.reply.terminal is not None

    def advance(self) -> TextReset | TextGrown | ReplyEnded | None:
        """The next thing to tell the client, or None when it knows everything there is."""
        reply = self.reply
        if reply.attempt == 0 and reply.terminal is None:
            return None  # nothing is known of it yet
        # A client may have seen more than was recorded before a node died: if nobody will say it again, start over.
        ahead = self.offset > reply.offset and reply.terminal is not None
        if self.attempt != reply.attempt or ahead:
            known_before = self.attempt > 0
            self.attempt, self.offset = reply.attempt, 0
            if known_before:
                return TextReset(reply.attempt)
        if self.offset < reply.offset:
            text = reply.text_from(self.offset)
            self.offset += len(text)
            return TextGrown(reply.attempt, text, self.offset)
        if reply.terminal is not None:
            return ReplyEnded(reply.attempt, reply.offset, reply.terminal)
        return None
