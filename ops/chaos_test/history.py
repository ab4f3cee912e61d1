"""What was asked, what was told, what was recorded: the raw facts of a run, that accounts are made of. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

TERMINAL = ("done", "failed", "cancelled")


@dataclass
class Asked:
    """One message, as its client knows it. Times are seconds of one clock.

    Attributes:
        question: What was asked.
        expected: The backend's answer to it.
        accepted_at: When it was told that the message will be answered; None when it never was.
        ended_at: When it was told the end.
        outcome: The end that it was told: `done`, `failed`, `cancelled` or `expired`.
        text: The answer that it put together.
        why: What it was told with the end, or the error that ended it.
        error: Whether an error ended it: the server broke the contract, or the session.
        unknown: How often it was left in the dark: told `UNAVAILABLE`, which may mean accepted or not.
        refused: How often it was told `BUSY`.
        cancelling: Whether it has asked to cancel.
    """

    user_id: int
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
    def key(self) -> tuple[int, str]:
        """User and message id: what a message is known by."""
        return self.user_id, self.message_id


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a reply stream. `fields` are all of it, and its id, for whoever looks into what went wrong."""

    event: str
    attempt: int
    text: str = ""
    by: str = ""
    fields: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Complaint:
    """A frame on the wire that should not have been said. `twice`: a second end of the same message."""

    user_id: int
    message_id: str
    what: str
    twice: bool = False


Recorded = dict[tuple[int, str], list[Entry]]
"""The reply streams that are in Redis at the end."""
