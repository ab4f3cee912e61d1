"""The words of the protocol: codes, events, types of frames and close codes.

Their meanings, and the reactions of clients, are in ops/protocol_words.toml and ops/docs/protocol.md. One word means
one thing; `SYSTEM_ERROR` alone has two, because the service that imstream replaces sends it in both cases.
"""

from enum import IntEnum, StrEnum
from typing import Self


class Code(StrEnum):
    """The `code` of a server frame: success, or the kind of error."""

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
    INIT_TIMEOUT = "INIT_TIMEOUT"
    DRAINING = "DRAINING"
    NODE_FULL = "NODE_FULL"
    NO_HEARTBEAT = "NO_HEARTBEAT"
    READER_TOO_SLOW = "READER_TOO_SLOW"
    REPLACED = "REPLACED"
    TOO_MANY_SOCKETS = "TOO_MANY_SOCKETS"


class MsgType(StrEnum):
    """The `msgType` of a frame."""

    INIT = "INIT"
    CHAT = "CHAT"
    CANCEL = "CANCEL"
    HEARTBEAT = "HEARTBEAT"
    SYSTEM = "SYSTEM"


class Event(StrEnum):
    """The `event` of a CHAT frame."""

    ACCEPTED = "accepted"
    DELTA = "delta"
    RESTART = "restart"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STATUS = "status"
    THINKING = "thinking"
    ASKED = "asked"


class Want(StrEnum):
    """An item of `wants` in INIT: frames that only clients that request them receive."""

    STATUS = "status"
    THINKING = "thinking"
    ASKED = "asked"


class State(StrEnum):
    """The `state` of a message. Clients ignore unknown states."""

    QUEUED = "queued"
    STARTED = "started"
    THINKING = "thinking"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class CloseCode(IntEnum):
    """Why a socket is closed. Clients reconnect after 1012, 1013 and 4000 to 4499, but not after 4500 to 4999.

    `reason` is the text of the close frame, at most 123 bytes. Up to 1009, it names the problem instead.
    """

    reason: str

    def __new__(cls, number: int, reason: str) -> Self:
        """Make a member from its row."""
        self = int.__new__(cls, number)
        self._value_ = number
        self.reason = reason
        return self

    INVALID_FRAME = 1002, "invalid frame"
    INVALID_TEXT = 1007, "not UTF-8"
    FRAME_TOO_BIG = 1009, "message too big"
    INTERNAL_ERROR = 1011, "unexpected error on the server"
    DRAINING = 1012, "the node is draining, reconnect now"
    NODE_FULL = 1013, "the node is full or cannot check logins, reconnect later"
    NO_HEARTBEAT = 4001, "no heartbeat"
    READER_TOO_SLOW = 4002, "the client does not read"
    NOT_AUTHENTICATED = 4500, "no INIT in time, or no valid token"
    BAD_USER_ID = 4501, "invalid user id"
    REPLACED = 4502, "replaced by a newer login"
    LOCKED = 4503, "the account is locked or banned"
    TOO_MANY_SOCKETS = 4504, "too many sockets of this user"
