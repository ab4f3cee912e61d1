"""The words of the protocol: codes, events, types of frames and close codes, each with its meaning.

A member and its row of the tables in ops/docs/protocol.md and asyncapi.json are one thing, so none lacks a meaning. One
word means one thing; `SYSTEM_ERROR` alone has two, because the service that imstream replaces sends it in both cases.
"""

from enum import IntEnum, StrEnum
from typing import Self


class Fault(StrEnum):
    """Who caused a code, and so who can do something about it."""

    NOBODY = "nobody"
    CLIENT = "the client program"
    USER = "the user"
    SERVICE = "the service"


class Word(StrEnum):
    """A word of the protocol. Its members are rows of a table: the word, then a value for each annotation."""

    def __new__(cls, word: str, *row: object) -> Self:
        """Make a member from its row."""
        self = str.__new__(cls, word)
        self._value_ = word
        for name, value in zip(cls.__annotations__, row, strict=True):
            setattr(self, name, value)
        return self


class Code(Word):
    """The `code` of a server frame: success, or the kind of error.

    Attributes:
        meaning: What happened.
        fault: Who caused it.
        action: What a client does.
    """

    meaning: str
    fault: Fault
    action: str

    SUCCESS = ("SUCCESS", "No error.", Fault.NOBODY, "Read the frame.")
    SYSTEM_ERROR = (
        "SYSTEM_ERROR",
        "An unexpected error of the server, or, before close 4501, an invalid user id.",
        Fault.SERVICE,
        "Show `contents`. A message may be sent again with the same `messageId`.",
    )
    BAD_REQUEST = (
        "BAD_REQUEST",
        "The frame is invalid, or exceeds a limit; `contents` names the field or problem.",
        Fault.CLIENT,
        "Do not send it again unchanged.",
    )
    UNAUTHORIZED = (
        "UNAUTHORIZED",
        "The token is missing, invalid, expired, or another user's; or it expires soon.",
        Fault.USER,
        "Send INIT with a new token.",
    )
    FORBIDDEN = (
        "FORBIDDEN",
        "The user may not do this: not logged in, another user's, banned or locked, or refused contents.",
        Fault.USER,
        "Show `contents`. Do not send it again unchanged.",
    )
    BUSY = (
        "BUSY",
        "The queue of the node, or the user's share of it, is full. The message was not accepted.",
        Fault.SERVICE,
        "Send the message again after `retryAfterMs`.",
    )
    RATE_LIMITED = (
        "RATE_LIMITED",
        "Too many frames, messages per minute, or messages per day.",
        Fault.USER,
        "With a `messageId`, the message was not accepted: send it again after `retryAfterMs`. Without one, wait.",
    )
    AI_FAILED = (
        "AI_FAILED",
        "The message was accepted and could not be answered.",
        Fault.SERVICE,
        "Show `contents`. Ask again with a new `messageId`.",
    )
    UNAVAILABLE = (
        "UNAVAILABLE",
        "The node cannot serve now, because it is draining or a service that it needs does not answer.",
        Fault.SERVICE,
        "Send the frame again after `retryAfterMs`, a message with the same `messageId`.",
    )
    EXPIRED = (
        "EXPIRED",
        "There is no record of a message that was to be resumed.",
        Fault.NOBODY,
        "Stop waiting for its answer. Ask again with a new `messageId`.",
    )
    TOO_LATE = ("TOO_LATE", "The message to be cancelled has ended already.", Fault.NOBODY, "Nothing.")
    UNKNOWN = ("UNKNOWN", "The message to be cancelled is not known.", Fault.CLIENT, "Nothing.")
    INIT_TIMEOUT = (
        "INIT_TIMEOUT",
        "The socket sent no INIT in time. Close 4500 follows.",
        Fault.CLIENT,
        "Connect again with backoff, with the same token. Send INIT as soon as the socket is open.",
    )
    DRAINING = (
        "DRAINING",
        "The node is stopping. Close 1012 follows.",
        Fault.NOBODY,
        "Connect again at once, to any node, and resume.",
    )
    NODE_FULL = (
        "NODE_FULL",
        "The node has the maximum number of sockets. Close 1013 follows.",
        Fault.SERVICE,
        "Connect again later.",
    )
    NO_HEARTBEAT = (
        "NO_HEARTBEAT",
        "The socket was silent for too long. Close 4001 follows.",
        Fault.CLIENT,
        "Connect again and resume. Send heartbeats at the interval `heartbeatMs`.",
    )
    READER_TOO_SLOW = (
        "READER_TOO_SLOW",
        "The client did not read from the socket for too long. Close 4002 follows.",
        Fault.CLIENT,
        "Connect again and resume.",
    )
    REPLACED = (
        "REPLACED",
        "The user has logged in elsewhere, and only one socket is allowed. Close 4502 follows.",
        Fault.NOBODY,
        "Do not connect again until the user asks for it.",
    )
    TOO_MANY_SOCKETS = (
        "TOO_MANY_SOCKETS",
        "The user has the maximum number of sockets on this node. Close 4504 follows.",
        Fault.USER,
        "Do not connect again until another socket of the user is closed.",
    )


class MsgType(Word):
    """The `msgType` of a frame.

    Attributes:
        from_client: What it means in a frame of the client; empty if clients do not send it.
        from_server: What it means in a frame of the server; empty if the server does not send it.
    """

    from_client: str
    from_server: str

    INIT = "INIT", "Log in, and resume messages.", "The login succeeded."
    CHAT = "CHAT", "Ask a question.", "Something about one message; `event` says what."
    CANCEL = "CANCEL", "Stop the answer to a message.", ""
    HEARTBEAT = "HEARTBEAT", "Show that the client is alive.", "The answer to a heartbeat."
    SYSTEM = "SYSTEM", "", "An error; `code` says which."


class Event(Word):
    """The `event` of a CHAT frame, and what a client does about it (`action`)."""

    meaning: str
    action: str

    ACCEPTED = (
        "accepted",
        "The message will be answered.",
        "Discard the text so far: the answer is sent from its beginning.",
    )
    DELTA = ("delta", "New text of the answer.", "Append `contents`. Keep `attempt` and `offset` for `resume`.")
    RESTART = (
        "restart",
        "A new attempt begins, also after `failed`, when an operator retries the message.",
        "Discard the text so far.",
    )
    DONE = (
        "done",
        (
            "The answer is complete. `finishReason` is `length` when the model or `IMSTREAM_MAX_ANSWER` cut it, "
            "`content_filter` when a filter did, `refusal` when the text is the model's refusal, and `other` when the "
            "backend's own reason was not a short word."
        ),
        "Keep the text; say so if it was cut.",
    )
    FAILED = (
        "failed",
        "The message could not be answered (`AI_FAILED`), or a guard or the AI service refused it (`FORBIDDEN`).",
        "Show `contents`. The text so far is incomplete.",
    )
    CANCELLED = ("cancelled", "The message was cancelled.", "Keep the text so far.")
    STATUS = (
        "status",
        (
            "The `state` of an unfinished message. While it is queued, again when `position` or `etaMs` changes, at "
            "most once a second."
        ),
        "Show it, if it is known.",
    )
    THINKING = (
        "thinking",
        "New reasoning of the model, before its answer. It does not belong to the answer, and is not kept with it.",
        "Show it apart from the answer: append `contents`, or with `start` 0 start again. Discard it at a `restart`.",
    )
    ASKED = (
        "asked",
        (
            "`contents` is the question, asked on another socket of the user, or of a message resumed from its "
            "beginning. Questions over 8,192 characters are cut and end with `…`."
        ),
        "Show the question above its answer.",
    )

    @property
    def is_terminal(self) -> bool:
        """Whether no other event of the message follows, unless it is sent again."""
        return self in {Event.DONE, Event.FAILED, Event.CANCELLED}


class Want(Word):
    """An item of `wants` in INIT: frames that only clients receive that ask for them."""

    meaning: str

    STATUS = "status", "The event `status` for each message that the socket follows."
    THINKING = "thinking", "The event `thinking`, where `IMSTREAM_THINKING=show` allows it."
    ASKED = "asked", "The event `asked`, and `messages` in the answer to INIT."


class State(Word):
    """The `state` of a message. Clients ignore states that they do not know."""

    meaning: str

    QUEUED = "queued", "It waits for its turn."
    STARTED = "started", "The AI is asked, or its answer has begun."
    THINKING = "thinking", "The model thinks before it answers. `started` follows when the text begins."
    WAITING = "waiting", "The AI service is away: it is asked again, after `retryAfterMs` if that is known."
    DONE = "done", "It has ended: see the event of this name. Only in `messages`."
    FAILED = "failed", "It has ended: see the event of this name. Only in `messages`."
    CANCELLED = "cancelled", "It has ended: see the event of this name. Only in `messages`."


class CloseCode(IntEnum):
    """Why a socket is closed. Clients reconnect after 1012, 1013 and 4000 to 4499, but not after 4500 to 4999.

    Attributes:
        reason: The reason text of the close frame; at most 123 bytes. Up to 1009, it names the problem instead.
        meaning: What happened.
        fault: Who caused it.
        action: What a client does.
    """

    reason: str
    meaning: str
    fault: Fault
    action: str

    def __new__(cls, number: int, reason: str, meaning: str, fault: Fault, action: str) -> Self:
        """Make a member from its row."""
        self = int.__new__(cls, number)
        self._value_ = number
        self.reason, self.meaning, self.fault, self.action = reason, meaning, fault, action
        return self

    INVALID_FRAME = (
        1002,
        "invalid frame",
        "The WebSocket protocol was violated.",
        Fault.CLIENT,
        "Connect again with backoff, and resume.",
    )
    INVALID_TEXT = (
        1007,
        "not UTF-8",
        "A text is not UTF-8.",
        Fault.CLIENT,
        "Connect again with backoff, and do not send the message again.",
    )
    FRAME_TOO_BIG = (
        1009,
        "message too big",
        "A message is longer, or has more fragments, than allowed.",
        Fault.CLIENT,
        "Connect again, and do not send the message again.",
    )
    INTERNAL_ERROR = (
        1011,
        "unexpected error on the server",
        "An unexpected error on the server.",
        Fault.SERVICE,
        "Connect again with backoff, and resume.",
    )
    DRAINING = (
        1012,
        "the node is draining, reconnect now",
        "The node is stopping.",
        Fault.NOBODY,
        "Connect again at once, to any node, and resume.",
    )
    NODE_FULL = (
        1013,
        "the node is full or cannot check logins, reconnect later",
        "The node has too many sockets, or cannot check logins now.",
        Fault.SERVICE,
        "Connect again later.",
    )
    NO_HEARTBEAT = (
        4001,
        "no heartbeat",
        "The socket was silent for too long.",
        Fault.CLIENT,
        "Connect again with backoff, and resume.",
    )
    READER_TOO_SLOW = (
        4002,
        "the client does not read",
        "The client did not read from the socket for too long.",
        Fault.CLIENT,
        "Connect again with backoff, and resume.",
    )
    NOT_AUTHENTICATED = (
        4500,
        "no INIT in time, or no valid token",
        "No INIT in time, or no valid token any longer.",
        Fault.USER,
        "Do not connect again without a new token, except after `INIT_TIMEOUT`.",
    )
    BAD_USER_ID = (
        4501,
        "invalid user id",
        "The user id is missing or invalid.",
        Fault.CLIENT,
        "Do not connect again with this user id.",
    )
    REPLACED = (
        4502,
        "replaced by a newer login",
        "A newer login replaces this one (`IMSTREAM_SESSIONS=one`).",
        Fault.NOBODY,
        "Do not connect again until the user asks for it.",
    )
    LOCKED = (
        4503,
        "the account is locked or banned",
        "The account is locked or banned.",
        Fault.USER,
        "Do not connect again before the lock ends.",
    )
    TOO_MANY_SOCKETS = (
        4504,
        "too many sockets of this user",
        "The user has the maximum number of sockets on this node.",
        Fault.USER,
        "Do not connect again until another socket of the user is closed.",
    )
