"""The marker `[[demo …]]`: anywhere in a question, it scripts the call that answers this question.

    [[demo length=200 pace=20ms]]   200 deltas, one every 20 ms
    [[demo first=3s]]               three seconds before the first delta
    [[demo fail=2]]                 503 twice; called again, the answer
    [[demo fail=1 status=400]]      refused with 400; called again, the answer
    [[demo busy=1 after=3s]]        429 with Retry-After: 3; called again, the answer
    [[demo hang=1]]                 no first delta; called again, the answer
    [[demo stall=1]]                silent from the middle on; called again, the answer
    [[demo break=1]]                cut in the middle; called again, the answer
    [[demo unended=1]]              ends in the middle as if whole; called again, the answer

Several may stand together: they come in the order fail, busy, hang, stall, break, unended. What is not understood is
ignored, so that no text can do harm.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imstream.demo.settings import Span

_MARKER = re.compile(r"\s*\[\[demo\b(?P<words>[^\]]*)\]\]")
_MANY = 1_000_000

Calls = Annotated[int, Field(ge=0, le=_MANY)]


class Fault(StrEnum):
    """One way in which a call goes wrong. The order is the one in which a marker's faults come."""

    FAIL = "fail"
    """Answered with an error status."""
    BUSY = "busy"
    """Answered with 429 and Retry-After."""
    HANG = "hang"
    """Never gets a first delta; the connection stays open."""
    STALL = "stall"
    """Falls silent in the middle; the connection stays open."""
    BREAK = "break"
    """The connection is cut in the middle."""
    UNENDED = "unended"
    """Ends cleanly in the middle, without finish_reason and `[DONE]`."""


class Marker(BaseModel):
    """What a marker asks for. Numbers of faults are calls of that exact question, counted until one is answered."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    length: int | None = Field(None, ge=0, le=100_000)
    pace: Span | None = None
    first: Span | None = None
    status: int = Field(503, ge=400, le=599)
    after: Span | None = None

    fail: Calls = 0
    busy: Calls = 0
    hang: Calls = 0
    stall: Calls = 0
    broken: Calls = Field(0, alias="break")
    unended: Calls = 0

    def faults(self) -> list[tuple[Fault, int]]:
        """The faults that are asked for, in their order, with the number of calls each takes."""
        return [(fault, count) for fault in Fault if (count := self._count(fault))]

    def _count(self, fault: Fault) -> int:
        return int(getattr(self, "broken" if fault is Fault.BREAK else fault.value))

    def fault_of(self, call: int) -> Fault | None:
        """How call number `call` (from 0) of the question goes wrong; None when it is answered."""
        for fault, count in self.faults():
            if call < count:
                return fault
            call -= count
        return None


_NONE = Marker()


def read(question: str) -> tuple[str, Marker]:
    """Take the marker out of a question; a question without one has the marker that asks for nothing."""
    found = _MARKER.search(question)
    if found is None:
        return question, _NONE
    plain = (question[: found.start()] + question[found.end() :]).strip()
    asked = dict(word.split("=", 1) for word in found["words"].split() if "=" in word)
    try:
        return plain, Marker.model_validate(asked)
    except ValidationError as error:
        wrong = {str(line["loc"][0]) for line in error.errors()}
        return plain, Marker.model_validate({name: value for name, value in asked.items() if name not in wrong})
