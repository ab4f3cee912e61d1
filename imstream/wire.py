"""The frames of the WebSocket protocol, as JSON text. Field names are those of the service that imstream replaces.

A client's frame is one of `ClientFrame`, which frame_parser.py reads. Each kind of server frame is one model below
`ServerFrame`; clients read all kinds as `ReceivedFrame`. The words of the protocol are in codes.py, the meanings of
words and fields in ops/protocol_words.toml and ops/docs/protocol.md.
"""

from enum import StrEnum
from typing import Annotated, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic_core import to_json

from imstream.clock import now_ms
from imstream.codes import Code, Event, MsgType, State
from imstream.tracing import parse_traceparent
from imstream.user_ids import UserId, UserIdField

_Member = TypeVar("_Member", bound=StrEnum)

USER_ID_FIELD = "userId"

SUBPROTOCOL = "imstream.v1.json"
"""Subprotocol of the handshake. A client that offers it may offer its token as a second one."""

MAX_RESUMED = 64
"""Maximum number of messages that one INIT may resume, and that its answer lists."""

MAX_WANTS = 16


Count = Annotated[int, Field(ge=0, le=2**53)]
MESSAGE_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,64}$"
MessageId = Annotated[str, Field(pattern=MESSAGE_ID_PATTERN)]

ErrorCode = Annotated[
    Code, WithJsonSchema({"type": "string", "enum": sorted(set(Code) - {Code.SUCCESS, Code.EXPIRED})})
]
"""Any code but those that have frames of their own."""


class _Frame(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


class Turn(_Frame):
    """One earlier message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str


class ResumePoint(_Frame):
    """How far a client has read the reply to one message: the last `attempt` and `offset` that it received."""

    message_id: MessageId
    attempt: Count = 0
    offset: Count = 0


class ClientInit(_Frame):
    """Login. `resume` lists the messages for which the client has no terminal event."""

    msg_type: Literal["INIT"]
    user_id: UserIdField
    token: str | None = Field(None, repr=False)
    resume: Annotated[list[ResumePoint], FailFast()] = Field(default=[], max_length=MAX_RESUMED)
    wants: Annotated[list[str], FailFast()] = Field(default=[], max_length=MAX_WANTS)


class ClientChat(_Frame):
    """A question to the AI. Without a message id, the server generates one and returns it in `accepted`."""

    msg_type: Literal["CHAT"]
    user_id: UserIdField
    message_id: MessageId | None = None
    contents: str = Field(min_length=1)
    history: Annotated[list[Turn], FailFast()] = []
    traceparent: Annotated[str | None, BeforeValidator(parse_traceparent)] = None


class ClientCancel(_Frame):
    """Cancellation of one message of this user."""

    msg_type: Literal["CANCEL"]
    user_id: UserIdField | None = None
    message_id: MessageId


class ClientHeartbeat(_Frame):
    """Heartbeat; the bare text `PING` is one too."""

    msg_type: Literal["HEARTBEAT"]
    user_id: UserIdField | None = None


ClientFrame = ClientInit | ClientChat | ClientCancel | ClientHeartbeat


def _plain(member: _Member) -> _Member:
    """A default of a server frame: the string that `use_enum_values` would make of it, each time and in Python."""
    return cast("_Member", member.value)


class ServerFrame(_Frame):
    """A frame of the server: the fields that every kind has. Fields without a value are left out of the JSON."""

    # Strings are encoded in a third of the time that members of enumerations take. Defaults are strings, see `_plain`.
    model_config = ConfigDict(use_enum_values=True)

    code: Code = _plain(Code.SUCCESS)
    resp_time: str = Field(default_factory=lambda: str(now_ms()))
    msg_type: MsgType

    def encode(self) -> str:
        """Encode as JSON text."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class KnownMessage(_Frame):
    """A message of the user that can be resumed."""

    message_id: str
    state: State


class Welcome(ServerFrame):
    """The answer to INIT: the user is logged in."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.INIT] = _plain(MsgType.INIT)
    contents: str
    user_id: UserId
    remaining: int | None = None
    heartbeat_ms: int | None = None
    node: str | None = None
    messages: list[KnownMessage] | None = None


class HeartbeatReply(ServerFrame):
    """The answer to a heartbeat."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.HEARTBEAT] = _plain(MsgType.HEARTBEAT)
    contents: str
    user_id: UserId | None = None


class Problem(ServerFrame):
    """An error: a refused frame or message, a throttled socket, or the reason of the close that follows."""

    code: ErrorCode
    msg_type: Literal[MsgType.SYSTEM] = _plain(MsgType.SYSTEM)
    contents: str
    user_id: UserId | None = None
    message_id: str | None = None
    retry_after_ms: int | None = None


class Expired(ServerFrame):
    """There is no record of a message that was to be resumed."""

    code: Literal[Code.EXPIRED] = _plain(Code.EXPIRED)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str
    message_id: str


class Accepted(ServerFrame):
    """A message will be answered."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str
    user_id: UserId
    message_id: str
    event: Literal[Event.ACCEPTED] = _plain(Event.ACCEPTED)
    position: int | None = None
    remaining: int | None = None
    node: str | None = None


class Delta(ServerFrame):
    """New text of an answer."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str
    message_id: str
    event: Literal[Event.DELTA] = _plain(Event.DELTA)
    attempt: int
    offset: int


class Restart(ServerFrame):
    """A new attempt begins: the text so far is discarded."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str
    message_id: str
    event: Literal[Event.RESTART] = _plain(Event.RESTART)
    attempt: int
    offset: int


class Ending(ServerFrame):
    """The end of an answer: the fields that its three kinds have."""

    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str | None = None
    user_id: UserId | None = None
    message_id: str
    event: Event
    attempt: int | None = None
    offset: int | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    node: str | None = None


class Done(Ending):
    """The answer is complete."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    event: Literal[Event.DONE] = _plain(Event.DONE)


class Failed(Ending):
    """The message could not be answered, or a guard refused it."""

    code: ErrorCode = _plain(Code.AI_FAILED)
    contents: str
    event: Literal[Event.FAILED] = _plain(Event.FAILED)


class Cancelled(Ending):
    """The message was cancelled. Without an offset: the socket did not follow the answer."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    contents: str
    event: Literal[Event.CANCELLED] = _plain(Event.CANCELLED)


class Status(ServerFrame):
    """The state of an unfinished message, for clients that want `status`."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    message_id: str
    event: Literal[Event.STATUS] = _plain(Event.STATUS)
    state: Literal[State.QUEUED, State.STARTED, State.THINKING, State.WAITING]
    position: int | None = None
    eta_ms: int | None = None
    reason: str | None = None
    retry_after_ms: int | None = None


class Thinking(ServerFrame):
    """New reasoning of the model, for clients that want `thinking`."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str
    message_id: str
    event: Literal[Event.THINKING] = _plain(Event.THINKING)
    attempt: int
    start: int


class Asked(ServerFrame):
    """The question of a message, for clients that want `asked`."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str
    message_id: str
    event: Literal[Event.ASKED] = _plain(Event.ASKED)


_FIRST_MATCH = Field(union_mode="left_to_right")


class ReceivedMessage(KnownMessage):
    """The same, as clients read it."""

    state: Annotated[State | str, _FIRST_MATCH]  # type: ignore[assignment] # wider, see below


class ReceivedFrame(ServerFrame):
    """A server frame of any kind, as clients read it: every field may be missing, and unknown ones are ignored.

    A newer server may send other codes, events and states; they are read as text.
    """

    model_config = ConfigDict(use_enum_values=False)

    code: Annotated[Code | str, _FIRST_MATCH] = Code.SUCCESS  # type: ignore[assignment] # wider, see above
    contents: str | None = None
    user_id: UserId | None = None
    message_id: str | None = None
    event: Annotated[Event | str | None, _FIRST_MATCH] = None
    attempt: int | None = None
    offset: int | None = None
    start: int | None = None
    state: Annotated[State | str | None, _FIRST_MATCH] = None
    position: int | None = None
    eta_ms: int | None = None
    reason: str | None = None
    remaining: int | None = None
    heartbeat_ms: int | None = None
    retry_after_ms: int | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    node: str | None = None
    messages: list[ReceivedMessage] | None = None


def encode_delta(message_id: str, *, attempt: int, offset: int, text: str) -> str:
    """Encode a `delta` exactly as `Delta` does, at a tenth of the cost. Message ids need no escaping."""
    return (
        f'{{"code":"SUCCESS","respTime":"{now_ms()}","msgType":"CHAT","contents":{to_json(text).decode()},'
        f'"messageId":"{message_id}","event":"delta","attempt":{attempt},"offset":{offset}}}'
    )
