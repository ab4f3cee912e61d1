"""What the gateway says: each situation as one frame, in the person's language."""

from __future__ import annotations

import random
from datetime import timedelta
from math import ceil

from imstream.guards.guard import Reject
from imstream.reply_buffer import ReplyEnded, TextGrown, TextReset
from imstream.texts import Lang, Sentence, Text, localize
from imstream.wire import Code, Event, InvalidFrame, MsgType, ServerFrame, encode_delta

RETRY_AFTER_MS = 2_000
"""When a refused client should try again, spread by half of it either way: they must not all come back at once."""

REFUSED_REASONS = frozenset({"http_400", "http_413", "http_422", "context_too_long", "content_filter"})
"""Failures that the person can mend by changing the message."""


def _ms(span: timedelta) -> int:
    return ceil(span.total_seconds() * 1000)


def _retry_after_ms() -> int:
    return int(RETRY_AFTER_MS * random.uniform(0.5, 1.5))  # noqa: S311 - spreading load, no secret


class FrameBuilder:
    """The frames for one person: their language, user id, and the node they are connected to."""

    __slots__ = ("_node", "lang", "user_id")

    def __init__(self, lang: Lang, node: str) -> None:
        self.lang = lang
        self.user_id: int | None = None
        self._node = node

    def welcome(self, remaining: int | None = None, heartbeat: timedelta | None = None) -> ServerFrame:
        """The answer to INIT."""
        return ServerFrame(
            msg_type=MsgType.INIT,
            contents=self._say(Text.WELCOME, user_id=self.user_id),
            user_id=self.user_id,
            remaining=remaining,
            heartbeat_ms=None if heartbeat is None else _ms(heartbeat),
            node=self._node,
        )

    def heartbeat(self) -> ServerFrame:
        """The answer to PING and HEARTBEAT."""
        return ServerFrame(msg_type=MsgType.HEARTBEAT, contents=self._say(Text.HEARTBEAT), user_id=self.user_id)

    def accepted(self, message_id: str, position: int, remaining: int | None = None) -> ServerFrame:
        """The message is in the stream."""
        return ServerFrame(
            msg_type=MsgType.CHAT,
            event=Event.ACCEPTED,
            contents=self._say(Text.ACCEPTED, position=position),
            user_id=self.user_id,
            message_id=message_id,
            position=position,
            remaining=remaining,
            node=self._node,
        )

    def busy(self, message_id: str, *, by_user: bool = False) -> ServerFrame:
        """The message does not fit: the node's cap, or the user's own."""
        return self.system(Code.BUSY, Text.USER_BUSY if by_user else Text.BUSY, message_id=message_id, retry=True)

    def refused(self, verdict: Reject, message_id: str | None = None) -> ServerFrame:
        """A guard lets it go no further."""
        return ServerFrame(
            code=verdict.code,
            msg_type=MsgType.SYSTEM,
            contents=self._say(verdict.sentence, **verdict.values),
            user_id=self.user_id,
            message_id=message_id,
            retry_after_ms=None if verdict.retry_after is None else _ms(verdict.retry_after),
        )

    def slow_down(self, rest: float) -> ServerFrame:
        """The socket is not read from for so many seconds. What was sent is not lost."""
        return ServerFrame(
            code=Code.RATE_LIMITED,
            msg_type=MsgType.SYSTEM,
            contents=self._say(Text.TOO_FAST),
            user_id=self.user_id,
            retry_after_ms=ceil(rest * 1000),
        )

    def bad_frame(self, error: InvalidFrame) -> ServerFrame:
        """The frame is not one of ours."""
        return self.system(Code.BAD_REQUEST, Text.BAD_FRAME, problem=str(error))

    def expired(self, message_id: str) -> ServerFrame:
        """Nothing is known of a message that was to be resumed."""
        return ServerFrame(
            code=Code.EXPIRED, msg_type=MsgType.CHAT, contents=self._say(Text.EXPIRED), message_id=message_id
        )

    def cancelled(self, message_id: str) -> ServerFrame:
        """The receipt of a CANCEL for whoever does not follow the message."""
        return ServerFrame(
            msg_type=MsgType.CHAT,
            event=Event.CANCELLED,
            contents=self._say(Text.CANCELLED),
            user_id=self.user_id,
            message_id=message_id,
        )

    def system(
        self, code: Code, text: Sentence, *, message_id: str | None = None, retry: bool = False, **values: object
    ) -> ServerFrame:
        """A SYSTEM frame; with `retry` it says when to try again."""
        return ServerFrame(
            code=code,
            msg_type=MsgType.SYSTEM,
            contents=self._say(text, **values),
            user_id=self.user_id,
            message_id=message_id,
            retry_after_ms=_retry_after_ms() if retry else None,
        )

    def step(self, message_id: str, step: TextReset | TextGrown | ReplyEnded) -> str:
        """What is new in a reply, as the text of a frame."""
        if isinstance(step, TextGrown):
            return encode_delta(message_id, attempt=step.attempt, offset=step.offset, text=step.text)
        if isinstance(step, ReplyEnded):
            return self._finished(message_id, step).encode()
        return ServerFrame(
            msg_type=MsgType.CHAT,
            event=Event.RESTART,
            contents=self._say(Text.RESTART),
            message_id=message_id,
            attempt=step.attempt,
            offset=0,
        ).encode()

    def _finished(self, message_id: str, step: ReplyEnded) -> ServerFrame:
        terminal = step.terminal
        code, contents = Code.SUCCESS, None
        if terminal.event == "failed":
            code = Code.AI_FAILED
            contents = self._say(Text.REFUSED if terminal.reason in REFUSED_REASONS else Text.FAILED)
            if terminal.refusal is not None:
                code, contents = Code(terminal.refusal.code), terminal.refusal.sentence
        elif terminal.event == "cancelled":
            contents = self._say(Text.CANCELLED)
        return ServerFrame(
            code=code,
            msg_type=MsgType.CHAT,
            event=Event(terminal.event),
            contents=contents,
            user_id=self.user_id,
            message_id=message_id,
            attempt=step.attempt,
            offset=step.offset,
            finish_reason=terminal.finish_reason,
            usage=terminal.usage,
            node=self._node,
        )

    def _say(self, text: Sentence, **values: object) -> str:
        return localize(text, self.lang, **values)
