"""Traces: which trace a request belongs to (W3C Trace Context), and the spans of its way, which only otel.py records.

A traceparent is `00-<trace id>-<span id>-<flags>`. It is kept in the entry of a request, so one trace holds the queue,
all attempts on all nodes, and the calls to backends. Without tracing, it is passed on, or made if it is missing.
"""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from random import getrandbits
from typing import Self

HEADER = "traceparent"

_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<ids>(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)
_KNOWN_FLAGS = 0x03  # sampled, random trace id
_SHORT_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")


def wants_tracing(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables set an address for traces, and do not switch them off."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    names = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    has_address = exporter == "otlp" or (not exporter and any(map(environment.get, names)))
    return has_address and environment.get("OTEL_SDK_DISABLED", "").lower() != "true"


def new_traceparent() -> str:
    """Begin a trace that is not recorded. `random` takes a seed of its own in each forked process."""
    return f"00-{getrandbits(128):032x}-{getrandbits(64):016x}-00"


def parse_traceparent(value: object) -> str | None:
    """A traceparent of any version as one of version 00; None if it is invalid."""
    match = _TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
    if match is None or (match["version"] == "00" and match["rest"] is not None):
        return None
    return f"00-{match['ids']}-{int(match['flags'], 16) & _KNOWN_FLAGS:02x}"


def read_traceparent(recorded: str) -> str:
    """The traceparent in an entry. Older releases wrote an id of 16 digits, which becomes the end of the trace id."""
    if (found := parse_traceparent(recorded)) is not None:
        return found
    return f"00-{recorded:0>32}-{recorded}-00" if _SHORT_ID.fullmatch(recorded) else new_traceparent()


class Span:
    """A part of a trace that is not recorded. `traceparent`: for parts within it."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End it, with the error, if any."""

    def call(self, _backend: str, _model: str, _host: str, _port: int | None) -> "Span":
        """Begin a call to an AI backend."""
        above = self.traceparent or new_traceparent()
        return Span(f"{above[:36]}{getrandbits(64):016x}{above[52:]}")

    def answered(self, finish_reason: str, usage: Mapping[str, int] | None) -> None:
        """Note how a call has ended."""

    def fail(self, reason: str, detail: str = "") -> None:
        """Note that it has failed. `reason`: a word for programs."""

    def note(self, result: str) -> None:
        """Note a result that is no failure."""

    def end(self) -> None:
        """End it."""


NO_SPAN = Span()

CURRENT: ContextVar[Span] = ContextVar("span", default=NO_SPAN)  # the attempt in which a backend is called


class Tracing:
    """Passes traceparents on. Spans are recorded by otel.py only."""

    def receive(self, given: str | None, _stream: str, _message_id: str) -> Span:
        """Begin to receive a message. `given`: the traceparent of its client."""
        return Span(given or new_traceparent())

    def queued(self, _traceparent: str, _stream: str, _message_id: str, *, waited: int) -> None:
        """A message has waited for a worker, so many milliseconds."""

    def attempt(self, traceparent: str, _stream: str, _message_id: str, _number: int) -> Span:
        """Begin an attempt at the answer to a message."""
        return Span(traceparent)

    async def stop(self) -> None:
        """Send recorded spans, within a time limit."""
