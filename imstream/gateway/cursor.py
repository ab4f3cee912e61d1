"""The position of one session in one reply, and the steps by which its client follows."""

from dataclasses import dataclass, field
from io import SEEK_END, StringIO
from typing import Literal, NamedTuple

from imstream.codes import State, Want
from imstream.model import Terminal, Waiting
from imstream.reply_buffer import MAX_DELTA, Place, ReplyBuffer


class TextReset(NamedTuple):
    """A new attempt has begun; the text so far is void."""

    attempt: int


class TextGrown(NamedTuple):  # made for nearly every frame, in a third of the time of a frozen dataclass
    """Text was added; `offset` is the position after it."""

    attempt: int
    text: str
    offset: int


class ThoughtsGrown(NamedTuple):
    """Reasoning was added, for sessions that request it; `start` is the position before it."""

    attempt: int
    text: str
    start: int


class ReplyEnded(NamedTuple):
    """The reply has ended, and all of its text was read."""

    attempt: int
    offset: int
    terminal: Terminal


class QuestionAsked(NamedTuple):
    """The question, for sessions that request it."""

    text: str


class StateChanged(NamedTuple):
    """The state of the message, for sessions that request it. `place`: while it is queued, where it is known."""

    state: Literal[State.QUEUED, State.STARTED, State.THINKING, State.WAITING]
    place: Place | None = None
    waiting: Waiting | None = None

    def is_news_after(self, told: "StateChanged | None") -> bool:
        """Whether to report this state after another."""
        if told is None or (told.state, told.waiting) != (self.state, self.waiting):
            return True
        return self.place is not None and (told.place is None or self.place.is_news_after(told.place))


Step = TextReset | TextGrown | ThoughtsGrown | ReplyEnded | QuestionAsked | StateChanged


@dataclass(slots=True, eq=False)
class Cursor:
    """The position of one session in one reply.

    Attributes:
        wants: The optional frames: the question (until it was sent), the state, and the reasoning.
    """

    reply: ReplyBuffer
    attempt: int = field(default=0, kw_only=True)
    offset: int = field(default=0, kw_only=True)
    wants: frozenset[str] = field(default=frozenset(), kw_only=True)
    _known_as: int = field(default=0, init=False)
    """The number of the attempt on the wire, unless it is its own: without `restart`, it does not change."""
    _told: StateChanged | None = field(default=None, init=False)
    _thoughts: StringIO | None = field(default=None, init=False)
    _thought: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """Characters of text and reasoning to be sent at once."""
        reply, thoughts = self.reply, self.reply.thoughts
        continues = self.offset <= reply.offset and reply.holds(self.attempt, self.offset)
        text = reply.offset - self.offset if continues else reply.offset
        return text + (0 if thoughts is None or Want.THINKING not in self.wants else thoughts.seek(0, SEEK_END))

    @property
    def has_more(self) -> bool:
        """Whether the next `advance` returns a step. Valid right after one that did."""
        return self.offset < self.reply.offset or self.reply.terminal is not None or bool(self.wants)

    def advance(self) -> Step | None:
        """Return the next step for the client; None when it is up to date."""
        reply = self.reply
        if self.wants and (step := self._inform()) is not None:
            return step
        if reply.attempt == 0 and reply.terminal is None:
            return None  # no attempt is known yet
        # A client may have seen more than was recorded before a node died. If the reply ends there, start over.
        ahead = self.offset > reply.offset and reply.terminal is not None
        if self.attempt != reply.attempt or ahead:
            known, self.attempt = self.attempt, reply.attempt
            if known > 0 and not ahead and reply.holds(known, self.offset):
                self._known_as = self._known_as or known
            else:
                self.offset = self._known_as = 0
                if known > 0:
                    return TextReset(reply.attempt)
        if self.wants and (thoughts := self._new_thoughts()) is not None:
            return thoughts
        if self.offset < reply.offset:
            text = reply.text_from(self.offset)
            self.offset += len(text)
            return TextGrown(self._known_as or reply.attempt, text, self.offset)
        end = reply.terminal
        return None if end is None else ReplyEnded(self._known_as or reply.attempt, reply.offset, end)

    def _inform(self) -> QuestionAsked | StateChanged | None:
        """Return the question or the state, unless the client has it."""
        reply = self.reply
        if Want.ASKED in self.wants and reply.question is not None:
            self.wants -= {Want.ASKED}
            return QuestionAsked(reply.question.text)
        if Want.STATUS in self.wants and (state := self._state()) is not None and state.is_news_after(self._told):
            self._told = state
            return state
        return None

    def _new_thoughts(self) -> ThoughtsGrown | None:
        """Return the next part of the reasoning, which precedes the text."""
        thoughts = self.reply.thoughts
        if thoughts is None or Want.THINKING not in self.wants:
            return None
        if thoughts is not self._thoughts:
            self._thoughts, self._thought = thoughts, 0
        start = thoughts.seek(self._thought)
        text = thoughts.read(MAX_DELTA)
        self._thought += len(text)
        return ThoughtsGrown(self._known_as or self.attempt, text, start) if text else None

    def _state(self) -> StateChanged | None:
        reply = self.reply
        if reply.terminal is not None:
            return None
        if reply.waiting is not None:
            return StateChanged(State.WAITING, waiting=reply.waiting)
        if reply.attempt > 0:
            return StateChanged(State.THINKING if reply.is_thinking else State.STARTED)
        return StateChanged(State.QUEUED, reply.place) if reply.is_queued else None
