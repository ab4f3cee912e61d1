"""What can go wrong for a client, as one tree below `ImstreamError`.

ClientError
├── NotConnected         no login within the time limit, or the server is not one of ours
├── SessionEnded         the server closed the session for good (4500 to 4999); `code` says why
├── ClientClosed         the client was closed while somebody waited for it
├── ProtocolViolation    the server broke the wire contract: text missing or repeated, a frame that makes no sense
├── Refused              the message was not accepted; `code` says why, `retry_after` when to try again
│   ├── Busy             the queue, or this user's share of it, is full
│   ├── RateLimited      too many messages in too short a time
│   ├── Unavailable      the service cannot take messages now
│   └── BadMessage       the message itself is wrong: the same one will never be accepted
└── Unanswered           the message was accepted and has no whole answer; `text` is what there is of it
├── Failed           the service gave up
├── Cancelled        somebody cancelled it
└── Expired          the reply is no longer kept
"""

from __future__ import annotations

from datetime import timedelta

from imstream.errors import ImstreamError
from imstream.wire import Code, ServerFrame


class ClientError(ImstreamError):
    """Anything that a client knows how to say."""


class NotConnected(ClientError):  # noqa: N818 - reads as the state that it names
    """No server let the client in: none was reached in time, or what answered is no imstream node."""


class SessionEnded(ClientError):  # noqa: N818 - reads as the state that it names
    """The server closed the session and does not want the client back.

    Attributes:
        code: The close code, 4500 to 4999; see `imstream.wire.CloseCode`.
    """

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code


class ClientClosed(ClientError):  # noqa: N818 - reads as the state that it names
    """The client was closed before the server had answered."""


class ProtocolViolation(ClientError):  # noqa: N818 - names what happened
    """The server said something that the wire contract rules out. What was received cannot be trusted."""


class Refused(ClientError):  # noqa: N818 - reads as the state that it names
    """The server did not accept the message; nothing will be answered.

    Attributes:
        code: The code of the server's frame.
        retry_after: How long to wait before sending again, when the server said so.
    """

    def __init__(self, code: Code, why: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(why or code.value)
        self.code = code
        self.retry_after = retry_after


class Busy(Refused):
    """The queue, or this user's share of it, is full."""


class RateLimited(Refused):
    """Too many messages in too short a time."""


class Unavailable(Refused):
    """The service cannot take messages now. Whether this one was recorded is unknown: send it with the same id."""


class BadMessage(Refused):
    """The message itself is wrong, or too big. Sending the same one again is no use."""


class Unanswered(ClientError):  # noqa: N818 - reads as the state that it names
    """The message was accepted, and ended without a whole answer.

    Attributes:
        text: What there is of the answer.
    """

    def __init__(self, why: str, text: str) -> None:
        super().__init__(why)
        self.text = text


class Failed(Unanswered):
    """The service gave the message up."""


class Cancelled(Unanswered):
    """The message was cancelled."""


class Expired(Unanswered):
    """The reply is no longer kept; the message has to be sent again."""


_REFUSALS: dict[Code, type[Refused]] = {
    Code.BUSY: Busy,
    Code.RATE_LIMITED: RateLimited,
    Code.UNAVAILABLE: Unavailable,
    Code.BAD_REQUEST: BadMessage,
}


def refusal(frame: ServerFrame) -> Refused:
    """The error that a frame with a code other than `SUCCESS` stands for."""
    wait = None if frame.retry_after_ms is None else timedelta(milliseconds=frame.retry_after_ms)
    return _REFUSALS.get(frame.code, Refused)(frame.code, frame.contents or "", retry_after=wait)
