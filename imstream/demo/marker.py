"""The marker `[[demo …]]`, anywhere in a question, controls the call that answers the question.

    [[demo length=200 pace=20ms]]   200 deltas, one every 20 ms
    [[demo first=3s]]               three seconds before the first delta
    [[demo fail=2]]                 503 for two calls, then the answer
    [[demo fail=1 status=400]]      400 for one call, then the answer
    [[demo busy=1 after=3s]]        429 with Retry-After: 3, then the answer
    [[demo hang=1]]                 no first delta, then the answer
    [[demo stall=1]]                no delta after the middle, then the answer
    [[demo break=1]]                connection closed in the middle, then the answer
    [[demo unended=1]]              ends in the middle without an error, then the answer

Several can be combined: they apply in the order fail, busy, hang, stall, break, unended. Unknown or invalid words are
ignored.
"""

import re
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imstream.demo.settings import Span

_MARKER = re.compile(r"\s*\[\[demo\b(?P<words>[^\]]*)\]\]")

Calls = Annotated[int, Field(ge=0, le=1_000_000)]


class Fault(StrEnum):
    """A way to fail, as described above, in the order in which they apply."""

    FAIL = "fail"
    BUSY = "busy"
    HANG = "hang"
    STALL = "stall"
    BREAK = "break"
    UNENDED = "unended"


class Marker(BaseModel):
    """The values of a marker. Faults are numbers of calls of exactly this question, until one is answered."""

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
        """The faults in their order, with the number of calls of each."""
        counts = self.model_dump(by_alias=True)
        return [(fault, counts[fault]) for fault in Fault if counts[fault]]

    def fault_of(self, call: int) -> Fault | None:
        """The fault of call number `call` (from 0) of the question; None if it is answered."""
        for fault, count in self.faults():
            if call < count:
                return fault
            call -= count
        return None


def parse_marker(question: str) -> tuple[str, Marker]:
    """Split a question into its text and its marker; without one, the marker has its defaults."""
    match = _MARKER.search(question)
    if match is None:
        return question, Marker()
    plain = (question[: match.start()] + question[match.end() :]).strip()
    values = dict(word.split("=", 1) for word in match["words"].split() if "=" in word)
    try:
        return plain, Marker.model_validate(values)
    except ValidationError as error:
        invalid = {str(line["loc"][0]) for line in error.errors()}
        return plain, Marker.model_validate({name: value for name, value in values.items() if name not in invalid})
