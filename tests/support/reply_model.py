"""A model of the reply stream's scripts in Python. It is checked against them, so that other tests can use it.

One model is one message.
"""

from dataclasses import dataclass, field
from typing import Literal, Self

from imstream.model import Record, Terminal
from imstream.store.replies import Appended, CancelRecorded, Duplicate, Ended, Opened, Rejected

TERMINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Said:
    """One entry of a reply stream."""

    attempt: int
    event: str
    offset: int
    text: str = ""
    request: str = ""
    by: str = ""
    terminal: Terminal | None = None

    @classmethod
    def read(cls, fields: dict[str, str]) -> Self:
        """An entry as in Redis, without the data of a terminal event."""
        return cls(
            attempt=int(fields["attempt"]),
            event=fields["event"],
            offset=int(fields["offset"]),
            text=fields.get("text", ""),
            request=fields.get("request", ""),
            by=fields.get("by", ""),
        )


@dataclass
class ReplyModel:
    """The events of one message."""

    entries: list[Said] = field(default_factory=list)

    @property
    def last(self) -> Said | None:
        """The last event."""
        return self.entries[-1] if self.entries else None

    @property
    def owner(self) -> str:
        """The request that the message belongs to."""
        return next((said.request for said in reversed(self.entries) if said.event == "opened"), "")

    def mark_queued(self) -> None:
        """See `ReplyStore`."""
        if not self.entries:
            self.entries.append(Said(0, "queued", 0))

    def open(self, *, request: str, lost: str = "", after: int = 0, by: str = "0") -> Opened | Ended | Duplicate:
        """See `ReplyStore`. `by` is the node of the store."""
        if self.last is not None:
            if self.last.terminal is not None:
                return Ended(self.last.terminal.event, self.owner)
            if self.last.attempt > 0 and self.owner not in {request, lost}:
                return Duplicate(self.owner)
            after = max(after, self.last.attempt)
        self.entries.append(Said(after + 1, "opened", 0, request=request, by=by))
        return Opened(after + 1)

    def append(
        self, *, attempt: int, before: int, after: int, text: str, terminal: Terminal | None = None
    ) -> Appended | Rejected:
        """See `ReplyStore`."""
        event, last = "text" if terminal is None else terminal.event, self.last
        if last is None:
            return Rejected("gone")
        if last.attempt != attempt:
            return Rejected("superseded")
        if (last.event, last.offset) == (event, after) and (terminal is not None or before < after):
            return Appended()
        if last.terminal is not None:
            return Rejected("ended")
        if last.offset != before:
            return Rejected("gap", last.offset)
        self.entries.append(Said(attempt, event, after, text, terminal=terminal))
        return Appended()

    def cancel(self) -> CancelRecorded | Literal["too_late", "unknown"]:
        """See `ReplyStore`. No user has a socket, so only the node that works on the message is notified."""
        if self.last is None:
            return "unknown"
        if self.last.event in ("done", "failed"):
            return "too_late"
        repeated = self.last.terminal is not None
        if not repeated:
            self.entries.append(Said(self.last.attempt, "cancelled", self.last.offset, terminal=Terminal("cancelled")))
        workers = [said.by for said in self.entries if said.event == "opened"]
        return CancelRecorded(tuple(workers[-1:]), repeated=repeated)

    def read(self) -> Record | None:
        """See `ReplyStore`."""
        if self.last is None:
            return None
        attempt = self.last.attempt
        text = "".join(said.text for said in self.entries if said.attempt == attempt)
        return Record(attempt, text, self.last.terminal)
