"""The errors of the client, all below `ClientError`.

ClientError
├── NotConnected         no login within the time limit
├── SessionEnded         the server ended the session (4500 to 4999); `code` is the close code
├── ClientClosed         the client was closed while the call was waiting
├── ProtocolViolation    the server violated the protocol: text missing, repeated, or an invalid frame
├── Refused              the message was not accepted; `code` is the reason, `retry_after` the time until the next try
│   ├── Busy             the queue, or this user's share of it, is full
│   ├── RateLimited      too many messages in too short a time
│   ├── Unavailable      the service cannot accept messages now
│   └── BadMessage       the message is invalid and will never be accepted
└── Unanswered           the message was accepted and has no complete answer; `text` is the incomplete one
    ├── Failed           the service gave the message up
    ├── Cancelled        the message was cancelled
    └── Expired          the reply was deleted
"""

from datetime import timedelta

from imstream.codes import Code
from imstream.errors import ImstreamError
from imstream.wire import ReceivedFrame


class ClientError(ImstreamError):
    """Base class of the client's errors."""


class NotConnected(ClientError):  # noqa: N818 - reads as the state that it names
    """No server accepted the login in time."""


class SessionEnded(ClientError):  # noqa: N818 - reads as the state that it names
    """The server ended the session. `code`: the close code; see `imstream.codes.CloseCode`."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code


class ClientClosed(ClientError):  # noqa: N818 - reads as the state that it names
    """The client was closed before the server answered."""


class ProtocolViolation(ClientError):  # noqa: N818 - names what happened
    """The server violated the protocol; the text received cannot be trusted."""


class Refused(ClientError):  # noqa: N818 - reads as the state that it names
    """The server did not accept the message.

    Attributes:
        code: The code of the refusal; a text for one of a newer server.
        retry_after: The server's advice when to send the message again.
    """

    def __init__(self, code: Code | str, why: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(why or code)
        self.code = code
        self.retry_after = retry_after


class Busy(Refused):
    """The queue, or this user's share of it, is full."""


class RateLimited(Refused):
    """Too many messages in too short a time."""


class Unavailable(Refused):
    """The service is unavailable. The message may have been recorded: send it again with the same id."""


class BadMessage(Refused):
    """The message is invalid or too big. Sending it again fails again."""


class Unanswered(ClientError):  # noqa: N818 - reads as the state that it names
    """The message was accepted and ended without a complete answer. `text`: the incomplete answer."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(why)
        self.text = text


class Failed(Unanswered):
    """The service gave the message up."""


class Cancelled(Unanswered):
    """The message was cancelled."""


class Expired(Unanswered):
    """The reply was deleted; the message has to be sent again."""


_REFUSALS: dict[str, type[Refused]] = {
    Code.BUSY: Busy,
    Code.RATE_LIMITED: RateLimited,
    Code.UNAVAILABLE: Unavailable,
    Code.BAD_REQUEST: BadMessage,
}


def refusal(frame: ReceivedFrame) -> Refused:
    """The error for a frame with another code than `SUCCESS`."""
    wait = None if frame.retry_after_ms is None else timedelta(milliseconds=frame.retry_after_ms)
    return _REFUSALS.get(frame.code, Refused)(frame.code, frame.contents or "", retry_after=wait)
