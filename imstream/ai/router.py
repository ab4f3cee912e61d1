"""Chooses the backend of each call: by priority, weight and free slots. Calls that find none wait, in their order."""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from imstream.ai.backend import Backend
from imstream.ai.backend_options import BackendOptions
from imstream.ai.call_gate import CallGate
from imstream.errors import BackendError
from imstream.settings import Settings


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
    prompt_limit: int
    """Tokens of the longest prompt that it takes."""
    in_flight: int = 0
    calls: int = 0
    last_error: str = ""
    credit: float = 0.0
    """What its weight has earned it in earlier choices, and its calls have spent."""

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

    def record_failure(self, error: BackendError, *, user: object) -> None:
        """A call has failed."""
        self.last_error = error.reason
        self.gate.record_failure(error, user=user)


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[Upstream]
    tried: Collection[Upstream]
    continuing: bool
    tokens: int


class Backends:
    """The backends of a node. Each one that `take`, `wait` or `take_probe` returns is given back by `release`."""

    def __init__(self, settings: Settings, backends: Sequence[tuple[Backend, BackendOptions]]) -> None:
        shared = Slots(settings.concurrency)
        answer, context = settings.answer_tokens, settings.context_tokens
        self._all = [
            Upstream(
                backend,
                options,
                CallGate(settings, backend.name, on_back=self._admit),
                shared if options.concurrency is None else Slots(options.concurrency),
                (options.context_tokens or context) - (options.answer_tokens or answer),
            )
            for backend, options in backends
        ]
        self.limits_prompts = any(upstream.prompt_limit < context - answer for upstream in self._all)
        """Whether some prompts are too long for one of them, so that `tokens` matters."""
        self._waiting: dict[_Waiter, None] = {}  # in their order
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def single(cls, settings: Settings, backend: Backend) -> Self:
        """One backend with the options of the settings."""
        return cls(settings, [(backend, BackendOptions.of(settings))])

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._all)

    @property
    def waiting(self) -> int:
        """Calls that wait for a backend."""
        return len(self._waiting)

    @property
    def is_closed(self) -> bool:
        """Whether all of them are away or just back, so that calls have to wait."""
        return all(upstream.gate.is_closed for upstream in self._all)

    @property
    def can_continue(self) -> bool:
        """Whether one of them continues answers."""
        return any(upstream.can_continue for upstream in self._all)

    def remaining(self) -> float:
        """Seconds until the next open breaker becomes half-open; 0 if none is open."""
        return min(filter(None, (upstream.gate.breaker.remaining() for upstream in self._all)), default=0.0)

    def slots(self) -> int:
        """Maximum calls at the same time. Backends that are away count with their running calls, unless all are."""
        if len(self._all) == 1:
            return self._all[0].slots.limit
        none_works = self._none_works
        limits = {id(one.slots): one.slots.used for one in self._all}
        limits |= {id(one.slots): one.slots.limit for one in self._all if none_works or not one.gate.breaker.tripped}
        return sum(limits.values())

    def startable(self) -> int:
        """Maximum requests that may start now. While all backends are away or just back, those that wait go first."""
        if self._waiting:
            return 0
        return int(self._probed() is not None) if self._none_works else self.slots()

    def take(self, *, tried: Collection[Upstream] = (), continuing: bool = False, tokens: int = 0) -> Upstream | None:
        """Begin a call at the best backend that may be called now, unless earlier calls wait for it.

        Backends in `tried` come last; with `continuing`, those that can continue come first. `tokens`: of the prompt.
        """
        if self._waiting:
            self._admit()
        chosen = self._choose(tried, continuing, tokens)
        return chosen and self._begin(chosen)

    def take_other(self, tried: Collection[Upstream], *, continuing: bool = False, tokens: int = 0) -> Upstream | None:
        """As `take`, but none of those in `tried`."""
        if len(tried) == len(self._all):
            return None
        if self._waiting:
            self._admit()
        chosen = self._choose(tried, continuing, tokens)
        return None if chosen is None or chosen in tried else self._begin(chosen)

    def take_probe(self) -> Upstream | None:
        """Begin the one call of a half-open backend; None if there is none, or another backend works."""
        if not self._none_works:
            return None
        probed = self._probed()
        return probed and self._begin(probed)

    async def wait(self, *, tried: Collection[Upstream] = (), continuing: bool = False, tokens: int = 0) -> Upstream:
        """As `take`, after all calls that wait already, as soon as there is a backend."""
        waiter = _Waiter(asyncio.get_running_loop().create_future(), tried, continuing, tokens)
        self._waiting[waiter] = None
        self._admit()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                self.release(waiter.turn.result())
            raise
        finally:
            self._waiting.pop(waiter, None)
            self._set_timer()

    def release(self, upstream: Upstream) -> None:
        """A call has ended."""
        upstream.slots.used -= 1
        upstream.in_flight -= 1
        if self._waiting:
            self._admit()

    @property
    def _none_works(self) -> bool:
        return all(one.gate.breaker.tripped for one in self._all)

    def _probed(self) -> Upstream | None:
        return next((one for one in self._all if one.may_be_called()), None)

    def _choose(self, tried: Collection[Upstream], continuing: bool, tokens: int) -> Upstream | None:  # noqa: FBT001 - private
        if len(self._all) == 1:
            return self._all[0] if self._all[0].may_be_called() else None
        best: tuple[bool, bool, int] | None = None
        equals = list[Upstream]()
        for one in self._all:
            if one.may_be_called(tokens):
                rank = one in tried, continuing and not one.can_continue, one.options.priority
                if best is None or rank < best:
                    best, equals = rank, []
                if rank == best:
                    equals.append(one)
        return _by_weight(equals) if equals else None

    def _begin(self, upstream: Upstream) -> Upstream:
        upstream.gate.begin()
        upstream.slots.used += 1
        upstream.in_flight += 1
        upstream.calls += 1
        return upstream

    def _admit(self) -> None:
        """Let those through that wait, in their order, as far as they find a backend."""
        for waiter in tuple(self._waiting):
            upstream = self._choose(waiter.tried, waiter.continuing, waiter.tokens)
            if upstream is not None:
                del self._waiting[waiter]
                if not waiter.turn.done():  # else it has just been cancelled
                    waiter.turn.set_result(self._begin(upstream))
            elif waiter.tokens == 0:
                break  # nor does anybody after it; with a shorter prompt they might
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            delay = min(filter(None, (one.gate.delay() for one in self._all)), default=0.0)
            if delay:
                self._timer = asyncio.get_running_loop().call_later(delay, self._admit)


def _by_weight(upstreams: Sequence[Upstream]) -> Upstream:
    """Share calls in proportion to weights and free slots: each earns its part of a call, the richest one pays for it.

    The calls of one are spread evenly between those of the others ("smooth weighted round robin").
    """
    if len(upstreams) > 1:
        total = 0.0
        for one in upstreams:
            earned = one.options.weight * (1 - one.slots.used / one.slots.limit)
            one.credit += earned
            total += earned
        chosen = max(upstreams, key=lambda one: one.credit)
        chosen.credit -= total
        return chosen
    return upstreams[0]
