"""One backend: its options, gate, slots and counters; and the choice among several by priority, weight and slots."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from imstream.ai.backend import Backend, OpenAIBackend
from imstream.ai.backend_options import BackendOptions
from imstream.ai.call_gate import CallGate
from imstream.clock import now_ms
from imstream.errors import BackendError


@dataclass(slots=True)
class Slots:
    """The calls that backends carry at the same time. Those without a `concurrency` of their own share the node's."""

    limit: int
    used: int = 0


@dataclass(slots=True, eq=False)
class Upstream:
    """A backend, its gate and its counters."""

    backend: Backend
    options: BackendOptions
    gate: CallGate
    slots: Slots
    prompt_limit: int  # tokens of the longest prompt that it takes
    in_flight: int = 0
    calls: int = 0
    last_error: str | None = None
    failed_at: int | None = None  # when its last error was (ms since 1970)
    is_reachable: bool = False  # whether a check has reached it since its last failure
    credit: float = 0.0  # credit by its weight in earlier choices, minus its calls

    @property
    def name(self) -> str:
        """Its name in logs and records."""
        return self.backend.name

    @property
    def can_continue(self) -> bool:
        """Whether it continues an answer whose beginning it is given."""
        return self.options.continues != "none"

    def may_be_called(self, tokens: int = 0) -> bool:
        """Whether a call with a prompt of so many tokens may be made now."""
        return (
            self.slots.used < self.slots.limit
            and tokens <= self.prompt_limit
            and (not self.gate.is_closed or self.gate.delay() == 0.0)
        )

    def is_only_full(self, tokens: int) -> bool:
        """Whether it works, and could take a prompt of so many tokens if it had a free slot."""
        return self.slots.used >= self.slots.limit and tokens <= self.prompt_limit and not self.gate.is_closed

    @property
    def state(self) -> dict[str, str | int | None]:
        """Its state, for operators. `until`: when it may be called again (ms since 1970)."""
        remaining = self.gate.breaker.remaining()
        return {
            "url": str(self.options.url),
            "model": self.options.model,
            "state": self.gate.state,
            "inFlight": self.in_flight,
            "calls": self.calls,
            "lastError": self.last_error,
            "failedAt": self.failed_at,
            "reason": self.gate.reason,
            "until": round(now_ms() / 1000 + remaining) * 1000 if remaining else None,
            "slots": self.slots.limit,
            "sharesSlots": self.options.concurrency is None,
        }

    def is_same_as(self, other: "Upstream") -> bool:
        """Whether the other has the same options, with the same values of the variables that they name."""
        return self.options == other.options and self.request == other.request

    @property
    def request(self) -> object:
        """The common part of its requests."""
        return self.backend.request if isinstance(self.backend, OpenAIBackend) else self.backend

    async def open(self) -> None:
        """Allow connections."""
        if isinstance(self.backend, OpenAIBackend):
            await self.backend.__aenter__()

    async def close(self) -> None:
        """Close all connections."""
        if isinstance(self.backend, OpenAIBackend):
            await self.backend.__aexit__()

    async def check(self) -> BackendError | None:
        """Return the error of future calls, as far as it is known without a prompt."""
        self.in_flight += 1  # it must not be closed meanwhile
        try:
            return await self.backend.check() if isinstance(self.backend, OpenAIBackend) else None
        finally:
            self.in_flight -= 1

    def record_failure(self, error: BackendError, *, user: object, period: int) -> None:
        """A call that began in this period of the gate has failed."""
        if error.kind != "impossible":  # that does not concern the backend
            self.is_reachable = False
            self.last_error, self.failed_at = str(error), now_ms()
        self.gate.record_failure(error, user=user, period=period)


def best(
    upstreams: Sequence[Upstream], tried: Collection[Upstream], tokens: int, *, continuing: bool
) -> Upstream | None:
    """The best of those that may be called now."""
    if len(upstreams) == 1:
        return upstreams[0] if upstreams[0].may_be_called(tokens) else None
    equals = candidates(upstreams, tried, tokens, continuing=continuing)
    return _by_weight(equals) if equals else None


def candidates(
    upstreams: Sequence[Upstream], tried: Collection[Upstream], tokens: int, *, continuing: bool
) -> list[Upstream]:
    """The equally good ones of those that may be called now; none while one that continues the answer is only full."""
    first, equals = None, list[Upstream]()
    for one in upstreams:
        if one.may_be_called(tokens):
            is_unknown = one.gate.breaker.tripped and not one.is_reachable
            rank = continuing and not one.can_continue, is_unknown, one in tried, one.options.priority
            if first is None or rank < first:
                first, equals = rank, []
            if rank == first:
                equals.append(one)
    if continuing and first is not None and first[0]:
        return [] if any(one.can_continue and one.is_only_full(tokens) for one in upstreams) else equals
    return equals


def _by_weight(upstreams: Sequence[Upstream]) -> Upstream:
    """Share calls in proportion to weights and free slots: each earns its part of a call, the richest one pays for it.

    The calls of one are spread evenly between those of the others ("smooth weighted round robin").
    """
    total = 0.0
    for one in upstreams:
        earned = one.options.weight * (1 - one.in_flight / one.slots.limit)
        one.credit += earned
        total += earned
    chosen = max(upstreams, key=lambda one: one.credit)
    chosen.credit -= total
    return chosen
