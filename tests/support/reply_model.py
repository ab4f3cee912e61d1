"""A model of the reply stream's scripts in Python. It is checked against them, so that other tests can use it.

One model is one message.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from imstream.model import Continued, Record, Terminal
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
    wire: int = 0
    valid: tuple[tuple[int, int], ...] = ()
    thinking: bool = False
    word: str = field(default="", compare=False)

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
            wire=int(fields.get("wire", 0)),
            valid=tuple(sorted(_pair(part) for part in fields.get("valid", "").split())),
            thinking="thinking" in fields,
        )


def _pair(text: str) -> tuple[int, int]:
    attempt, _, offset = text.partition(":")
    return int(attempt), int(offset)


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

    @property
    def latest(self) -> list[Said]:
        """The entries of the last attempt."""
        return [said for said in self.entries if said.attempt == self.entries[-1].attempt]

    def open(  # noqa: PLR0913 - as there
        self,
        *,
        request: str,
        lost: str = "",
        after: int = 0,
        by: str = "0",
        continues: int = 0,
        shown: int | None = None,
        word: str = "",
    ) -> Opened | Ended | Duplicate:
        """See `ReplyStore`. `by` is the node of the store."""
        last, continued = self.last, None
        if last is not None:
            if last.terminal is not None:
                return Ended(last.terminal.event, self.owner)
            if last.attempt > 0 and self.owner not in {request, lost}:
                return Duplicate(self.owner)
            begun = self.latest[0]
            if last.attempt > 0 and begun.word == word != "":
                continued = Continued(begun.wire, dict(begun.valid), None, begun.text) if begun.wire else None
                return Opened(last.attempt, continued=continued)
            known, after = after, max(after, last.attempt)
            if self.owner == request and 0 < last.offset < continues:
                wire, valid = self.latest[0].wire or last.attempt, dict(self.latest[0].valid)
                if (known, shown) != (last.attempt, last.offset):
                    valid[wire] = last.offset
                    wire = after + 1
                continued = Continued(wire, valid, None, "".join(said.text for said in self.latest))
        opened = Said(after + 1, "opened", 0, request=request, by=by, word=word)
        if continued is not None and last is not None:
            valid_now = tuple(sorted(continued.valid.items()))
            opened = replace(opened, offset=last.offset, text=continued.text, wire=continued.wire, valid=valid_now)
        self.entries.append(opened)
        return Opened(after + 1, continued=continued)

    def append(  # noqa: PLR0913 - as there
        self,
        *,
        attempt: int,
        before: int,
        after: int,
        text: str,
        terminal: Terminal | None = None,
        thinking: bool = False,
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
        self.entries.append(Said(attempt, event, after, text, terminal=terminal, thinking=thinking))
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
        first, text = self.latest[0], "".join(said.text for said in self.latest)
        continued = Continued(first.wire, dict(first.valid)) if first.wire else None
        return Record(first.attempt, text, self.last.terminal, continued=continued, thinking=self.last.thinking)
