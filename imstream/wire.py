"""The frames of the wire, in both directions. JSON text frames; field names are those of the service replaced.

`parse_frame` turns what a client sent into one of the `Client*` models; `ServerFrame` is all that a server says.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import to_json

from imstream.strict_json import InvalidJson, InvalidNumber, parse_json

MIN_USER_ID = 10001
MAX_USER_ID = 2**53 - 1
"""The largest integer that JavaScript's JSON keeps exact (RFC 8259, section 6)."""

USER_ID_FIELD = "userId"

SUBPROTOCOL = "imstream.v1.json"
"""The name of this protocol in a WebSocket handshake. A client that names it may name its token beside it."""

MAX_RESUMED = 64
"""Most messages one INIT may resume."""


class Code(StrEnum):
    """What kind of answer a frame is, for programs."""

    SUCCESS = "SUCCESS"
    SYSTEM_ERROR = "SYSTEM_ERROR"
    BAD_REQUEST = "BAD_REQUEST"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    BUSY = "BUSY"
    RATE_LIMITED = "RATE_LIMITED"
    AI_FAILED = "AI_FAILED"
    UNAVAILABLE = "UNAVAILABLE"
    EXPIRED = "EXPIRED"
    TOO_LATE = "TOO_LATE"
    UNKNOWN = "UNKNOWN"


class MsgType(StrEnum):
    """The `msgType` of a frame."""

    INIT = "INIT"
    CHAT = "CHAT"
    CANCEL = "CANCEL"
    HEARTBEAT = "HEARTBEAT"
    SYSTEM = "SYSTEM"


class Event(StrEnum):
    """The `event` of a CHAT frame. The last three are terminal: nothing follows them for that message."""

    ACCEPTED = "accepted"
    DELTA = "delta"
    RESTART = "restart"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class CloseCode(IntEnum):
    """Why a socket is closed. 1012, 1013 and 4000 to 4499: reconnect; 4500 to 4999: don't."""

    FRAME_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    """Something unforeseen on our side: reconnect."""
    DRAINING = 1012
    """The node is going away: reconnect now."""
    NODE_FULL = 1013
    """The node has too many sockets, or could log nobody in: reconnect later."""
    NO_HEARTBEAT = 4001
    READER_TOO_SLOW = 4002
    NOT_AUTHENTICATED = 4500
    BAD_USER_ID = 4501
    REPLACED = 4502
    LOCKED = 4503
    TOO_MANY_CONNECTIONS = 4504


UserId = Annotated[int, Field(ge=MIN_USER_ID, le=MAX_USER_ID)]
Count = Annotated[int, Field(ge=0, le=2**53)]
MessageId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]


class _Frame(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


class Turn(_Frame):
    """One earlier message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str


class ResumePoint(_Frame):
    """How far a client got with one message: `offset` as it was last told, in `attempt`."""

    message_id: MessageId
    attempt: Count = 0
    offset: Count = 0


class ClientInit(_Frame):
    """Logs in. `resume` lists the messages the client has no terminal event for."""

    msg_type: Literal["INIT"]
    user_id: UserId
    token: str | None = Field(None, repr=False)
    resume: Annotated[list[ResumePoint], FailFast()] = Field(default=[], max_length=MAX_RESUMED)


class ClientChat(_Frame):
    """Asks the AI. Without `message_id` one is made up and told in `accepted`."""

    msg_type: Literal["CHAT"]
    user_id: UserId
    message_id: MessageId | None = None
    contents: str = Field(min_length=1)
    history: Annotated[list[Turn], FailFast()] = []


class ClientCancel(_Frame):
    """Stops one message of this user."""

    msg_type: Literal["CANCEL"]
    user_id: UserId | None = None
    message_id: MessageId


class ClientHeartbeat(_Frame):
    """Says that the client is alive. The bare text `PING` means the same."""

    msg_type: Literal["HEARTBEAT"]
    user_id: UserId | None = None


ClientFrame = ClientInit | ClientChat | ClientCancel | ClientHeartbeat

_CLIENT_FRAME: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="msg_type")])
_PING = ClientHeartbeat(msg_type="HEARTBEAT")


class InvalidFrame(Exception):  # noqa: N818 - their fault, not an error of ours
    """A client's frame is not one of ours.

    Attributes:
        field: The field that is wrong, as it stands on the wire; empty when the whole frame is.
        problem: What is wrong with it, for a person.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """How much a client's frame may hold; its length is limited before it is read.

    Attributes:
        depth: Most arrays and objects within each other.
        history: Most turns in the history of one message.
    """

    depth: int = 8
    history: int = 200

    @property
    def values(self) -> int:
        """Most values in the JSON of a frame: a full history or `resume`, and hundreds in fields that are not known."""
        return 8 * MAX_RESUMED + 3 * self.history


def parse_frame(text: str, limits: FrameLimits = FrameLimits()) -> ClientFrame:
    """Read one text frame of a client.

    Raises:
        InvalidFrame: It is not JSON, not a known frame, a field is invalid, or a limit is exceeded.
    """
    if text == "PING":
        return _PING
    try:
        value = parse_json(text, max_depth=limits.depth, max_values=limits.values)
        too_long = _empty_history_beyond(limits.history, value)
        frame = _CLIENT_FRAME.validate_python(value, by_alias=True, by_name=False)  # Python's names are not the wire's
    except InvalidNumber as error:
        raise _field_of_bad_number(text) or InvalidFrame("", str(error)) from None
    except InvalidJson as error:
        raise InvalidFrame("", str(error)) from None
    except ValidationError as error:
        raise _first_problem(error) from None
    if too_long and isinstance(frame, ClientChat):
        raise InvalidFrame("history", f"more than {limits.history} turns")
    return frame


def _empty_history_beyond(limit: int, value: object) -> bool:
    """Empty a history that is too long; whether it was. Its turns need not be looked at any more."""
    history = value.get("history") if isinstance(value, dict) else None
    if not isinstance(history, list) or len(history) <= limit:
        return False
    history.clear()
    return True


def _field_of_bad_number(text: str) -> InvalidFrame | None:
    """Which field has it; None when none that we know. Pydantic's own parser bears such numbers, up to a length."""
    try:
        _CLIENT_FRAME.validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        return found if (found := _first_problem(error)).field else None
    except UnicodeEncodeError:  # a lone surrogate that is not escaped, which no socket lets through
        return None
    return None


def _first_problem(error: ValidationError) -> InvalidFrame:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # A wrong user id weighs more than anything else that is wrong with the frame.
    first = next((problem for problem in problems if problem["loc"][1:] == (USER_ID_FIELD,)), problems[0])
    if first["type"].startswith("union_tag"):
        return InvalidFrame("msgType", "must be one of INIT, CHAT, CANCEL, HEARTBEAT")
    # The location starts with the tag of the union, which is no field of the frame.
    return InvalidFrame(".".join(str(part) for part in first["loc"][1:]), first["msg"])


def parse_user_id(text: str | None) -> int | None:
    """Read the `userId` of a URL; None when it is missing, not a number, or out of range."""
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > len(str(MAX_USER_ID)):
        return None
    return number if MIN_USER_ID <= (number := int(text)) <= MAX_USER_ID else None


def now_ms() -> str:
    """Wall-clock milliseconds since 1970, as the wire wants them."""
    return str(time.time_ns() // 1_000_000)


class ServerFrame(_Frame):
    """All that a server says. Fields that do not apply are left out of the JSON.

    Attributes:
        contents: Text for a person, or of the reply.
        offset: Where the reply stands after this frame; opaque to clients, given back in `resume`.
        attempt: The attempt the text belongs to, from 1.
        position: Requests that wait for a worker up to and including this one; 1 is next.
        remaining: Chats that the user has left today, where their number is limited.
        heartbeat_ms: How often the client should be heard of.
    """

    code: Code = Code.SUCCESS
    resp_time: str = Field(default_factory=now_ms)
    msg_type: MsgType
    contents: str | None = None
    user_id: int | None = None
    message_id: str | None = None
    event: Event | None = None
    attempt: int | None = None
    offset: int | None = None
    position: int | None = None
    remaining: int | None = None
    heartbeat_ms: int | None = None
    retry_after_ms: int | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    node: str | None = None

    def encode(self) -> str:
        """The JSON text of this frame."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


def encode_delta(message_id: str, *, attempt: int, offset: int, text: str) -> str:
    """The JSON text of a `delta`, as `ServerFrame` would encode it, but written directly.

    Nearly all frames are deltas, and a model costs ten times as much as this line. The ids need no escaping.
    """
    return (
        f'{{"code":"SUCCESS","respTime":"{now_ms()}","msgType":"CHAT","contents":{to_json(text).decode()},'
        f'"messageId":"{message_id}","event":"delta","attempt":{attempt},"offset":{offset}}}'
    )
