"""Checks the frames of the servers on one connection, and complains about those that must not be sent. No I/O.

The check is stricter than the client library, which drops repeated text.
"""

from collections.abc import Callable, Iterator
from itertools import cycle

from pydantic import ValidationError
from pydantic_core import from_json

from imstream.codes import Code, Event, MsgType
from imstream.user_ids import UserId
from imstream.wire import ReceivedFrame
from ops.chaos_test.history import TERMINAL, Complaint

_SWITCHING, _ASKING = b"HTTP/1.1 101", b"GET "
_TEXT, _CONTROL, _FIN, _MASKED = 0x1, 0x8, 0x80, 0x80
_TWO_BYTES, _EIGHT_BYTES = 126, 127
_KNOWN_FIELDS = {field.alias for field in ReceivedFrame.model_fields.values()}
_NEVER = (
    *(Code.SYSTEM_ERROR, Code.BAD_REQUEST, Code.UNAUTHORIZED, Code.FORBIDDEN),
    *(Code.RATE_LIMITED, Code.UNKNOWN, Code.REPLACED, Code.TOO_MANY_SOCKETS),
)
"""Codes that these clients must never get."""


class FrameReader:
    """Splits the bytes of one side into the texts of its frames: RFC 6455, section 5.2, uncompressed.

    Args:
        opening: The beginning of its handshake; after another one, everything is ignored.
    """

    def __init__(self, opening: bytes = _SWITCHING) -> None:
        self._opening = opening
        self._rest = b""
        self._open = False
        self._ignored = False

    def feed(self, data: bytes) -> Iterator[str]:
        """Parse bytes.

        Raises:
            ValueError: A frame is neither a complete text nor a control frame, or is not UTF-8.
        """
        if self._ignored:
            return
        self._rest += data
        if not self._open:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return
            self._open, self._rest = True, rest
            self._ignored = not head.startswith(self._opening)
        while not self._ignored and (payload := self._next()) is not None:
            yield payload

    def _next(self) -> str | None:
        """The next text frame; control frames are skipped."""
        while len(self._rest) >= 2:  # noqa: PLR2004 - the minimum header
            first, length = self._rest[0], self._rest[1] & 0x7F
            size = {_TWO_BYTES: 2, _EIGHT_BYTES: 8}.get(length, 0)
            start = 2 + size
            if size:
                length = int.from_bytes(self._rest[2:start])
            mask = self._rest[start : start + 4] if self._rest[1] & _MASKED else b""
            start += 4 if self._rest[1] & _MASKED else 0
            if len(self._rest) < start + length:
                return None
            payload, self._rest = self._rest[start : start + length], self._rest[start + length :]
            if mask:
                payload = bytes(one ^ key for one, key in zip(payload, cycle(mask), strict=False))
            opcode = first & 0x0F
            if opcode & _CONTROL:
                continue
            if first != _FIN | _TEXT:
                raise ValueError(f"a frame that begins with {first:#x}")
            return payload.decode()
        return None


class _MessageState:
    """The frames of one connection about one message; None: not known yet."""

    def __init__(self) -> None:
        self.attempt: int | None = None
        self.offset: int | None = None
        self.ended = False
        self.cancels = 0
        """Number of cancel requests: this many receipts are allowed, also after the end."""


class Tap:
    """Checks one connection.

    Args:
        complain: Called with every complaint.
        on_accepted: Called with user and id of every accepted message.
    """

    def __init__(self, complain: Callable[[Complaint], None], on_accepted: Callable[[UserId, str], None]) -> None:
        self._complain = complain
        self._on_accepted = on_accepted
        self._frames = FrameReader()
        self._asked = FrameReader(_ASKING)
        self._states: dict[str, _MessageState] = {}
        self._user_id: UserId = 0

    def feed(self, data: bytes) -> None:
        """Check bytes of the server."""
        try:
            for text in self._frames.feed(data):
                self._check(text)
        except ValueError as error:
            self._report("", f"not the WebSocket of imstream: {error}")

    def feed_client(self, data: bytes) -> None:
        """Note the cancel requests in bytes of the client."""
        for text in self._asked.feed(data):
            frame = from_json(text)
            if frame["msgType"] == MsgType.CANCEL:
                self._states.setdefault(frame["messageId"], _MessageState()).cancels += 1

    def _check(self, text: str) -> None:
        try:
            frame = ReceivedFrame.model_validate_json(text)
        except ValidationError as error:
            return self._report("", f"an invalid frame ({error.errors()[0]['msg']}): {text[:300]}")
        if unknown := from_json(text).keys() - _KNOWN_FIELDS:
            self._report(frame.message_id or "", f"a frame with unknown fields {sorted(unknown)}: {text[:300]}")
        if not isinstance(frame.code, Code):
            self._report(frame.message_id or "", f"a frame with an unknown code: {text[:300]}")
        if frame.msg_type is MsgType.INIT and frame.user_id is not None:
            self._user_id = frame.user_id
        elif frame.msg_type is MsgType.CHAT:
            self._chat(frame)
        elif frame.msg_type is MsgType.SYSTEM and frame.code in _NEVER:
            self._report(frame.message_id or "", f"{frame.code}: {frame.contents}")
        return None

    def _chat(self, frame: ReceivedFrame) -> None:
        message_id = frame.message_id or ""
        state = self._states.setdefault(message_id, _MessageState())
        if frame.code is Code.EXPIRED:
            return self._report(message_id, "EXPIRED")
        if frame.event is Event.ACCEPTED:
            self._states[message_id] = fresh = _MessageState()
            fresh.cancels = state.cancels
            return self._on_accepted(self._user_id, message_id)
        if state.ended and frame.event is Event.CANCELLED and state.cancels > 0:
            state.cancels -= 1
            return None
        if state.ended:
            twice = frame.event in TERMINAL
            return self._report(message_id, f"{frame.event} after the end", twice=twice)
        if frame.event in TERMINAL:
            state.ended = True
            if frame.event is Event.DONE and state.offset not in (None, frame.offset):
                self._report(message_id, f"done at {frame.offset}, sent up to {state.offset}")
        elif frame.event is Event.RESTART:
            state.attempt, state.offset = frame.attempt, 0
        elif frame.event is Event.DELTA:
            self._delta(frame, state)
        else:
            self._report(message_id, f"a CHAT frame without an event: {frame.encode()[:300]}")
        return None

    def _delta(self, frame: ReceivedFrame, state: _MessageState) -> None:
        if frame.attempt is None or frame.offset is None or not frame.contents:
            return self._report(frame.message_id or "", f"an incomplete delta: {frame.encode()[:300]}")
        start = frame.offset - len(frame.contents)
        if state.attempt not in (None, frame.attempt):
            self._report(
                frame.message_id or "", f"a delta of attempt {frame.attempt} after {state.attempt}, without restart"
            )
        elif state.offset not in (None, start):
            self._report(frame.message_id or "", f"a delta from {start} on, sent up to {state.offset}")
        state.attempt, state.offset = frame.attempt, frame.offset
        return None

    def _report(self, message_id: str, what: str, *, twice: bool = False) -> None:
        self._complain(Complaint(self._user_id, message_id, what, twice))
