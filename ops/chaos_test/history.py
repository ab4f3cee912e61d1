"""The raw facts of a run: messages sent, frames received, entries recorded. No I/O."""

from dataclasses import dataclass, field

from imstream.user_ids import UserId

TERMINAL = ("done", "failed", "cancelled")


@dataclass
class SentMessage:
    """One message, as seen by its client. Times are seconds of one clock.

    Attributes:
        question: The text of the message.
        expected: The backend's answer to it.
        accepted_at: When `accepted` was received, if ever.
        ended_at: When the end was received.
        outcome: The end that was received: `done`, `failed`, `cancelled` or `expired`.
        text: The answer that was assembled.
        why: The server's sentence at the end, or the error.
        error: Whether an error ended it: a protocol violation, or the end of the session.
        unknown: Number of `UNAVAILABLE` refusals, after which the message may be accepted or not.
        refused: Number of `BUSY` refusals.
        cancelling: Whether the client cancels it.
    """

    user_id: UserId
    message_id: str
    question: str
    expected: str
    accepted_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None
    text: str = ""
    why: str = ""
    error: bool = False
    unknown: int = 0
    refused: int = 0
    cancelling: bool = False

    @property
    def key(self) -> tuple[UserId, str]:
        """User and message id."""
        return self.user_id, self.message_id


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a reply stream. `fields`: all fields and the id, for debugging."""

    event: str
    attempt: int
    text: str = ""
    by: str = ""
    fields: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Complaint:
    """A frame that must not be sent. `twice`: a second end of the same message."""

    user_id: UserId
    message_id: str
    what: str
    twice: bool = False


Recorded = dict[tuple[UserId, str], list[Entry]]
"""The reply streams in Redis at the end."""
