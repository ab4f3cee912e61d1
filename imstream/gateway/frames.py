"""The frames of the gateway: one for each situation, in the language of the client."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from math import ceil

from imstream.ai.failures import REQUEST_REASONS
from imstream.codes import Code, State
from imstream.frame_parser import InvalidFrame
from imstream.gateway.cursor import QuestionAsked, ReplyEnded, StateChanged, Step, TextGrown, TextReset, ThoughtsGrown
from imstream.guards.guard import Reject
from imstream.model import Terminal
from imstream.texts import Lang, Sentence, Text, localize
from imstream.user_ids import UserId
from imstream.wire import (
    Accepted,
    Asked,
    Cancelled,
    Done,
    Ending,
    Expired,
    Failed,
    HeartbeatReply,
    KnownMessage,
    Problem,
    Restart,
    Status,
    Thinking,
    Welcome,
    encode_delta,
)

RETRY_AFTER_MS = 2_000
"""When a refused client should retry, spread by half of it either way: they must not all come back at once."""

_CODES = frozenset(Code)


def _ms(duration: timedelta | None) -> int | None:
    return None if duration is None else ceil(duration.total_seconds() * 1000)


@dataclass(slots=True)
class FrameBuilder:
    """Builds the frames for one session: its language, node and user id."""

    lang: Lang
    node: str
    user_id: UserId | None = None

    def welcome(
        self,
        remaining: int | None = None,
        heartbeat: timedelta | None = None,
        messages: Mapping[str, State] | None = None,
    ) -> Welcome:
        """The answer to INIT."""
        known = None if messages is None else [KnownMessage(message_id=name, state=messages[name]) for name in messages]
        return Welcome(
            contents=self._text(Text.WELCOME, user_id=self.user_id),
            user_id=self._logged_in(),
            remaining=remaining,
            heartbeat_ms=_ms(heartbeat),
            node=self.node,
            messages=known,
        )

    def heartbeat(self) -> HeartbeatReply:
        """The answer to PING and HEARTBEAT."""
        return HeartbeatReply(contents=self._text(Text.HEARTBEAT), user_id=self.user_id)

    def accepted(self, message_id: str, position: int | None, remaining: int | None = None) -> Accepted:
        """A message is in the stream. Without a position, it has ended already."""
        text = Text.ANSWERED_BEFORE if position is None else Text.ACCEPTED
        return Accepted(
            contents=self._text(text, position=position),
            user_id=self._logged_in(),
            message_id=message_id,
            position=position,
            remaining=remaining,
            node=self.node,
        )

    def busy(self, message_id: str, *, by_user: bool = False) -> Problem:
        """A message does not fit: the cap of the node, or that of the user, is reached."""
        return self.system(Code.BUSY, Text.USER_BUSY if by_user else Text.BUSY, message_id=message_id, retry=True)

    def rejected(self, verdict: Reject, message_id: str | None = None) -> Problem:
        """A guard has rejected a login or a message."""
        return Problem(
            code=verdict.code,
            contents=self._text(verdict.sentence, **verdict.values),
            user_id=self.user_id,
            message_id=message_id,
            retry_after_ms=_ms(verdict.retry_after),
        )

    def throttled(self, seconds: float) -> Problem:
        """Tell the client for how long its socket is not read. Frames already sent are processed later."""
        frame = self.system(Code.RATE_LIMITED, Text.TOO_FAST)
        return frame.model_copy(update={"retry_after_ms": ceil(seconds * 1000)})

    def bad_frame(self, error: InvalidFrame) -> Problem:
        """A frame is not valid."""
        return self.system(Code.BAD_REQUEST, Text.BAD_FRAME, message_id=error.message_id, problem=str(error))

    def expired(self, message_id: str) -> Expired:
        """There is no record of a message that was to be resumed."""
        return Expired(contents=self._text(Text.EXPIRED), message_id=message_id)

    def cancelled(self, message_id: str) -> Cancelled:
        """The answer to a CANCEL of a message that the socket does not follow."""
        return Cancelled(contents=self._text(Text.CANCELLED), user_id=self.user_id, message_id=message_id)

    def system(
        self, code: Code, text: Sentence, *, message_id: str | None = None, retry: bool = False, **values: object
    ) -> Problem:
        """A SYSTEM frame; with `retry` it has `retryAfterMs`."""
        spread = random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, no secret
        return Problem(
            code=code,
            contents=self._text(text, **values),
            user_id=self.user_id,
            message_id=message_id,
            retry_after_ms=int(RETRY_AFTER_MS * spread) if retry else None,
        )

    def reply_step(self, message_id: str, step: Step) -> str:
        """The text of the frame for one step of a reply."""
        if isinstance(step, TextGrown):  # nearly always; a pattern would take twice as long as the frame itself
            return encode_delta(message_id, attempt=step.attempt, offset=step.offset, text=step.text)
        match step:
            case ReplyEnded():
                return self._end(message_id, step).encode()
            case TextReset(attempt):
                text = self._text(Text.RESTART)
                return Restart(contents=text, message_id=message_id, attempt=attempt, offset=0).encode()
            case ThoughtsGrown(attempt, text, start):
                return Thinking(contents=text, message_id=message_id, attempt=attempt, start=start).encode()
            case QuestionAsked(text):
                return Asked(contents=text, message_id=message_id).encode()
            case StateChanged(state, place, waiting):
                return Status(
                    message_id=message_id,
                    state=state,
                    position=None if place is None else place.position,
                    eta_ms=None if place is None or place.wait is None else ceil(place.wait * 1000),
                    reason=waiting.reason if waiting else place and place.reason,
                    retry_after_ms=(None if waiting is None else waiting.retry_after) or None,
                ).encode()

    def _end(self, message_id: str, step: ReplyEnded) -> Ending:
        terminal = step.terminal
        common = {
            "user_id": self.user_id,
            "message_id": message_id,
            "attempt": step.attempt,
            "offset": step.offset,
            "finish_reason": terminal.finish_reason,
            "usage": terminal.usage,
            "node": self.node,
        }
        match terminal.event:
            case "done":
                return Done.model_validate(common)
            case "cancelled":
                return Cancelled.model_validate({"contents": self._text(Text.CANCELLED), **common})
            case "failed":
                return Failed.model_validate({**self._failure(terminal), **common})

    def _failure(self, terminal: Terminal) -> dict[str, object]:
        """Code and contents of a `failed` frame."""
        if (refusal := terminal.refusal) is not None:
            # A newer release may have recorded a code that is unknown here.
            return {"code": refusal.code if refusal.code in _CODES else Code.AI_FAILED, "contents": refusal.sentence}
        code = Code.FORBIDDEN if terminal.reason == "content_filter" else Code.AI_FAILED
        if terminal.reason in REQUEST_REASONS:
            text = Text.REFUSED
        else:
            text = Text.AI_AWAY if terminal.kind in {"away", "misconfigured"} else Text.FAILED
        return {"code": code, "contents": self._text(text)}

    def _logged_in(self) -> UserId:
        assert self.user_id is not None  # noqa: S101 - set by the login
        return self.user_id

    def _text(self, text: Sentence, **values: object) -> str:
        return localize(text, self.lang, **values)
