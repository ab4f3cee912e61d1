"""The frames of the WebSocket protocol, as JSON text. Field names are those of the service that imstream replaces.

A client's frame is one of `ClientFrame`, which frame_parser.py reads. Each kind of server frame is one model below
`ServerFrame`; clients read all kinds as `ReceivedFrame`. The words of the protocol are in codes.py. See
ops/docs/protocol.md.
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
MessageId = Annotated[
    str, Field(pattern=MESSAGE_ID_PATTERN, description="1 to 64 of `A-Z a-z 0-9 . _ : -`, unique per user")
]

# Fields of server frames. Their descriptions are part of ops/docs/protocol.md and asyncapi.json.
Sentence = Annotated[str, Field(description="a sentence for the user")]
AboutMessage = Annotated[str, Field(description="the message that the frame is about")]
Attempt = Annotated[int, Field(description="number of the attempt that the text belongs to, from 1")]
Offset = Annotated[int, Field(description="position in the text after this frame; opaque, to be returned in `resume`")]
Start = Annotated[int, Field(description="characters of the reasoning before this frame; with 0 it starts again")]
Position = Annotated[int, Field(description="place in the queue; 1 is next")]
EtaMs = Annotated[
    int, Field(description="estimate of the time until the answer begins, in milliseconds; absent without an estimate")
]
Remaining = Annotated[int, Field(description="messages left of the daily quota; only with a quota")]
HeartbeatMs = Annotated[int, Field(description="the heartbeat interval that the node expects, in milliseconds")]
RetryAfterMs = Annotated[int, Field(description="when to try again, in milliseconds from now")]
FinishReason = Annotated[str, Field(description="why the model stopped: `stop`, `length`, `content_filter`, …")]
Usage = Annotated[dict[str, int], Field(description="token counts, as the backend reports them")]
Node = Annotated[str, Field(description="the id of the node")]
ErrorCode = Annotated[
    Code, WithJsonSchema({"type": "string", "enum": sorted(set(Code) - {Code.SUCCESS, Code.EXPIRED})})
]
"""Any code but those that have frames of their own."""


class _Frame(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


class Turn(_Frame):
    """One earlier message of the conversation."""

    role: Literal["user", "assistant", "system"] = Field(description="who wrote it; `system` only where it is allowed")
    content: str = Field(description="its text")


class ResumePoint(_Frame):
    """How far a client has read the reply to one message: the last `attempt` and `offset` that it received."""

    message_id: MessageId
    attempt: Count = Field(0, description="the last `attempt` received")
    offset: Count = Field(0, description="the last `offset` received")


class ClientInit(_Frame):
    """Login. `resume` lists the messages for which the client has no terminal event."""

    msg_type: Literal["INIT"]
    user_id: UserIdField
    token: str | None = Field(
        None, repr=False, description="the user's signed token, where the node authenticates clients"
    )
    resume: Annotated[list[ResumePoint], FailFast()] = Field(
        default=[],
        max_length=MAX_RESUMED,
        description="up to 64 messages without a terminal event: "
        "`messageId`, and the last `attempt` and `offset` received",
    )
    wants: Annotated[list[str], FailFast()] = Field(
        default=[],
        max_length=MAX_WANTS,
        description="optional frames that the client wants from now on; unknown names are ignored",
    )


class ClientChat(_Frame):
    """A question to the AI. Without a message id, the server generates one and returns it in `accepted`."""

    msg_type: Literal["CHAT"]
    user_id: UserIdField
    message_id: MessageId | None = None
    contents: str = Field(min_length=1, description="the text of the message")
    history: Annotated[list[Turn], FailFast()] = Field(
        default=[],
        description="earlier turns, oldest first: `role` is `user`, `assistant`, or where it is allowed `system`; "
        "`content` is the text",
    )
    traceparent: Annotated[str | None, BeforeValidator(parse_traceparent)] = Field(
        None, description="the trace that it belongs to (W3C Trace Context); an invalid one is ignored"
    )


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
    resp_time: str = Field(
        default_factory=lambda: str(now_ms()), description="time of the server in milliseconds since 1970, as a string"
    )
    msg_type: MsgType

    def encode(self) -> str:
        """Encode as JSON text."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class KnownMessage(_Frame):
    """A message of the user that can be resumed."""

    message_id: AboutMessage
    state: State = Field(description="its state; clients ignore unknown ones")


class Welcome(ServerFrame):
    """The answer to INIT: the user is logged in."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.INIT] = _plain(MsgType.INIT)
    contents: Sentence
    user_id: UserId
    remaining: Remaining | None = None
    heartbeat_ms: HeartbeatMs | None = None
    node: Node | None = None
    messages: list[KnownMessage] | None = Field(
        None, description="with the want `asked`: the newest messages of the user that can be resumed, oldest first"
    )


class HeartbeatReply(ServerFrame):
    """The answer to a heartbeat."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.HEARTBEAT] = _plain(MsgType.HEARTBEAT)
    contents: Sentence
    user_id: UserId | None = None


class Problem(ServerFrame):
    """An error: a refused frame or message, a throttled socket, or the reason of the close that follows."""

    code: ErrorCode
    msg_type: Literal[MsgType.SYSTEM] = _plain(MsgType.SYSTEM)
    contents: Sentence
    user_id: UserId | None = None
    message_id: AboutMessage | None = None
    retry_after_ms: RetryAfterMs | None = None


class Expired(ServerFrame):
    """There is no record of a message that was to be resumed."""

    code: Literal[Code.EXPIRED] = _plain(Code.EXPIRED)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: Sentence
    message_id: AboutMessage


class Accepted(ServerFrame):
    """A message will be answered."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: Sentence
    user_id: UserId
    message_id: AboutMessage
    event: Literal[Event.ACCEPTED] = _plain(Event.ACCEPTED)
    position: Position | None = None
    remaining: Remaining | None = None
    node: Node | None = None


class Delta(ServerFrame):
    """New text of an answer."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str = Field(description="new text")
    message_id: AboutMessage
    event: Literal[Event.DELTA] = _plain(Event.DELTA)
    attempt: Attempt
    offset: Offset


class Restart(ServerFrame):
    """A new attempt begins: the text so far is discarded."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: Sentence
    message_id: AboutMessage
    event: Literal[Event.RESTART] = _plain(Event.RESTART)
    attempt: Attempt
    offset: Offset


class Ending(ServerFrame):
    """The end of an answer: the fields that its three kinds have."""

    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: Sentence | None = None
    user_id: UserId | None = None
    message_id: AboutMessage
    event: Event
    attempt: Attempt | None = None
    offset: Offset | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    node: Node | None = None


class Done(Ending):
    """The answer is complete."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    event: Literal[Event.DONE] = _plain(Event.DONE)


class Failed(Ending):
    """The message could not be answered, or a guard refused it."""

    code: ErrorCode = _plain(Code.AI_FAILED)
    contents: Sentence
    event: Literal[Event.FAILED] = _plain(Event.FAILED)


class Cancelled(Ending):
    """The message was cancelled. Without an offset: the socket did not follow the answer."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    contents: Sentence
    event: Literal[Event.CANCELLED] = _plain(Event.CANCELLED)


class Status(ServerFrame):
    """The state of an unfinished message, for clients that want `status`."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    message_id: AboutMessage
    event: Literal[Event.STATUS] = _plain(Event.STATUS)
    state: Literal[State.QUEUED, State.STARTED, State.THINKING, State.WAITING] = Field(
        description="its state; clients ignore unknown ones"
    )
    position: Position | None = None
    eta_ms: EtaMs | None = None
    reason: (
        Annotated[str, Field(description="why it waits: a word for programs, such as `http_503`, or `paused`")] | None
    ) = None
    retry_after_ms: RetryAfterMs | None = None


class Thinking(ServerFrame):
    """New reasoning of the model, for clients that want `thinking`."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str = Field(description="new reasoning")
    message_id: AboutMessage
    event: Literal[Event.THINKING] = _plain(Event.THINKING)
    attempt: Attempt
    start: Start


class Asked(ServerFrame):
    """The question of a message, for clients that want `asked`."""

    code: Literal[Code.SUCCESS] = _plain(Code.SUCCESS)
    msg_type: Literal[MsgType.CHAT] = _plain(MsgType.CHAT)
    contents: str = Field(description="the question")
    message_id: AboutMessage
    event: Literal[Event.ASKED] = _plain(Event.ASKED)


SERVER_FRAMES: tuple[type[ServerFrame], ...] = (
    Welcome,
    HeartbeatReply,
    Problem,
    Accepted,
    Delta,
    Restart,
    Done,
    Failed,
    Cancelled,
    Expired,
    Status,
    Thinking,
    Asked,
)
"""Every kind of server frame."""


_FIRST_MATCH = Field(union_mode="left_to_right")


class ReceivedMessage(KnownMessage):
    """The same, as clients read it."""

    state: Annotated[State | str, _FIRST_MATCH]  # type: ignore[assignment] # wider, see below


class ReceivedFrame(ServerFrame):
    """A server frame of any kind, as clients read it: every field may be missing, and unknown ones are ignored.

    A newer server may know other codes, events and states; they are read as text.
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
