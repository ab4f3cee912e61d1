"""Chooses the backend of each call: by priority, weight and free slots. Calls that find none wait, in their order."""

import asyncio
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Self

import structlog

from imstream.ai.backend import Backend, OpenAIBackend
from imstream.ai.backend_file import ignored_settings, read_backends
from imstream.ai.backend_options import BackendOptions
from imstream.ai.call_gate import CallGate
from imstream.ai.rollup import RollUp
from imstream.ai.upstream import Slots, Upstream, best, candidates
from imstream.settings import Settings

RECHECK = 3.0
"""Seconds after which a backend that cannot be reached is checked again: it may have been started with the node."""

DEFAULT_CONCURRENCY = 64  # calls at the same time to the backends without a `concurrency`

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[Upstream]
    tried: Collection[Upstream]
    continuing: bool
    tokens: int


def capacity(settings: Settings) -> int:
    """Maximum requests that a node with these settings answers at the same time. Raises `SettingsError`."""
    if settings.concurrency is not None:
        return settings.concurrency
    own = [options.concurrency for options in _read(settings)]
    return sum(filter(None, own)) + DEFAULT_CONCURRENCY * (None in own)


def _read(settings: Settings) -> list[BackendOptions]:
    file = settings.ai_backends
    return [BackendOptions.of(settings)] if file is None else read_backends(file, settings)


class Backends:
    """The backends of a node. Each one that `take`, `wait` or `take_probe` returns is given back by `release`."""

    def __init__(self, settings: Settings, *given: Backend) -> None:
        """The backends of the settings or of their file; or those given, with the options of the settings.

        An async context manager, which opens and closes their connections. Raises `SettingsError`.
        """
        self._settings = settings
        self._limit = settings.concurrency or sys.maxsize
        self._shared = Slots(settings.concurrency or DEFAULT_CONCURRENCY)
        self.rollup = RollUp(settings.rollup)
        self._all = [self._make(options) for options in _read(settings)] if not given else []
        self._all += [self._upstream(backend, BackendOptions.of(settings)) for backend in given]
        self._retired = list[Upstream]()  # backends that were removed from the file, and may have running calls
        self._waiting: dict[_Waiter, None] = {}  # in their order
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        if self._settings.ai_backends is not None and (ignored := ignored_settings(self._settings)):
            log.warning(
                "settings of a single backend are ignored", file=str(self._settings.ai_backends), ignored=ignored
            )
        for one in self._all:
            await one.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        for one in (*self._all, *self._retired):
            await one.close()

    async def reload(self) -> bool:
        """Read the file again; return whether it has changed. Raises `SettingsError`, and then nothing is changed.

        Backends whose options are the same stay as they are; calls to the others end where they were made.
        """
        if self._settings.ai_backends is None:
            return False
        known = list(self._all)
        made = [self._make(options) for options in _read(self._settings)]
        listed = [next(filter(new.is_same_as, known), new) for new in made]
        if listed == known:
            return False
        for one in listed:
            if one not in known:
                await one.open()
        for one, before in ((one, before) for one in listed for before in known if one.name == before.name):
            if one is not before and None not in {one.options.concurrency, before.options.concurrency}:
                before.slots.limit, one.slots = one.slots.limit, before.slots  # with the calls that still run
        self._all, self._retired = listed, [*self._retired, *(one for one in known if one not in listed)]
        for waiter in self._waiting:
            waiter.tokens = self._possible(waiter.tokens)
        self._admit()
        return True

    async def close_retired(self) -> None:
        """Close the connections of backends that were removed from the file, once their calls have ended."""
        for one in [one for one in self._retired if one.in_flight == 0]:
            self._retired.remove(one)
            await one.close()

    async def check(self) -> None:
        """Log which backends will not answer, as far as that is known without a prompt."""
        await asyncio.gather(*map(self._check, self._all))

    async def recheck(self) -> None:
        """Check the half-open ones while others work: no call has to try one that is frozen and accepts connections."""
        if self._none_works:
            return
        due = [one for one in self._all if one.gate.breaker.tripped and not one.is_reachable and one.may_be_called()]
        await asyncio.gather(*map(_recheck, due))

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._all)

    @property
    def waiting(self) -> int:
        """Calls that wait for a backend."""
        return len(self._waiting)

    @property
    def limits_prompts(self) -> bool:
        """Whether some prompts are too long for one of them, so that `tokens` matters."""
        budget = self._settings.context_tokens - self._settings.answer_tokens
        return any(upstream.prompt_limit < budget for upstream in self._all)

    def have_larger(self, upstream: Upstream) -> bool:
        """Whether one of them takes longer prompts than this one."""
        return any(one.prompt_limit > upstream.prompt_limit for one in self._all)

    @property
    def is_closed(self) -> bool:
        """Whether all of them are away or just back, so that calls have to wait."""
        return all(upstream.gate.is_closed for upstream in self._all)

    @property
    def can_continue(self) -> bool:
        """Whether one of them continues answers."""
        return any(upstream.can_continue for upstream in self._all)

    @property
    def may_be_called(self) -> bool:
        """Whether one of them may be called now, with a short prompt."""
        return self._callable() is not None

    def remaining(self) -> float:
        """Seconds until the next open breaker becomes half-open; 0 if none is open."""
        return min(filter(None, (upstream.gate.breaker.remaining() for upstream in self._all)), default=0.0)

    def slots(self) -> int:
        """Maximum calls at the same time. Backends that are away count with their running calls, unless all are."""
        if len(self._all) == 1:
            return min(self._limit, self._all[0].slots.limit)
        none_works = self._none_works
        limits = {id(one.slots): one.slots.used for one in self._all}
        limits |= {id(one.slots): one.slots.limit for one in self._all if none_works or not one.gate.breaker.tripped}
        return min(self._limit, sum(limits.values()))

    def states(self) -> dict[str, dict[str, str | int | None]]:
        """Their states, for operators, by name."""
        return {one.name: {**one.state, "nodeSlots": self._settings.concurrency} for one in self._all}

    def startable(self) -> int:
        """Maximum requests that may start now. While all backends are away or just back, those that wait go first."""
        if self._waiting:
            self._admit()  # those that still wait have too long prompts for the backends that may be called
        if (self._waiting or self._none_works) and not self.may_be_called:
            return 0
        return 1 if self._none_works else self.slots()

    def take(self, *, tried: Collection[Upstream] = (), continuing: bool = False, tokens: int = 0) -> Upstream | None:
        """Begin a call at the best backend that may be called now, unless earlier calls wait for it.

        With `continuing`, those that can continue come first; then those that are not in `tried`. `tokens`: of the
        prompt.
        """
        if self._waiting:
            self._admit()
        chosen = best(self._all, tried, self._possible(tokens), continuing=continuing)
        return chosen and self._begin(chosen)

    def take_other(self, tried: Collection[Upstream], *, continuing: bool = False, tokens: int = 0) -> Upstream | None:
        """As `take`, but none of those in `tried`."""
        others = [one for one in self._all if one not in tried]
        if self._waiting:
            self._admit()
        chosen = best(others, (), self._possible(tokens), continuing=continuing)
        return chosen and self._begin(chosen)

    def take_probe(self) -> Upstream | None:
        """Begin a call at a half-open backend. None: none may be called now, or another backend works."""
        if not self._none_works:
            return None
        probed = self._callable()
        return probed and self._begin(probed)

    async def wait(self, *, tried: Collection[Upstream] = (), continuing: bool = False, tokens: int = 0) -> Upstream:
        """As `take`, after all calls that wait already, as soon as there is a backend."""
        waiter = _Waiter(asyncio.get_running_loop().create_future(), tried, continuing, self._possible(tokens))
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

    async def _check(self, one: Upstream) -> None:
        error = await one.check()
        if error is not None and error.reason == "connect_failed":
            await asyncio.sleep(RECHECK)
            error = await one.check() if one in self._all else None  # else it was removed, and may be closed
        if error is not None:
            log.warning("backend check failed", backend=one.name, reason=error.reason, error=error.detail)

    def _possible(self, tokens: int) -> int:
        """Not more tokens than one of them takes: after a reload, a prompt may be too long for all; they report it."""
        return tokens and min(tokens, max(one.prompt_limit for one in self._all))

    def _make(self, options: BackendOptions) -> Upstream:
        return self._upstream(OpenAIBackend(self._settings, options, self.rollup), options)

    def _upstream(self, backend: Backend, options: BackendOptions) -> Upstream:
        return Upstream(
            backend,
            options,
            CallGate(self._settings, backend.name, on_back=self._admit),
            self._shared if options.concurrency is None else Slots(options.concurrency),
            options.prompt_limit(self._settings),
        )

    @property
    def _none_works(self) -> bool:
        # The first one alone is nearly always enough, for a fifth of the CPU.
        return self._all[0].gate.breaker.tripped and all(one.gate.breaker.tripped for one in self._all)

    def _callable(self) -> Upstream | None:
        return next((one for one in self._all if one.may_be_called()), None)

    def _begin(self, upstream: Upstream) -> Upstream:
        upstream.gate.begin()
        upstream.slots.used += 1
        upstream.in_flight += 1
        upstream.calls += 1
        return upstream

    def _admit(self) -> None:
        """Let those through that wait, in their order, as far as they find a backend."""
        for waiter in tuple(self._waiting):
            upstream = best(self._all, waiter.tried, waiter.tokens, continuing=waiter.continuing)
            if upstream is not None:
                del self._waiting[waiter]
                if not waiter.turn.done():  # else it has just been cancelled
                    waiter.turn.set_result(self._begin(upstream))
            elif not waiter.continuing and all(waiter.tokens <= one.prompt_limit for one in self._all):
                break  # nor do those after it; with a shorter prompt they might, or if it waits for one backend
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            delay = min(filter(None, (one.gate.delay() for one in self._all)), default=None)
            # Time has passed: a backend that could not be called a moment ago may have no delay now.
            if any(candidates(self._all, (), one.tokens, continuing=one.continuing) for one in self._waiting):
                delay = 0.0
            if delay is not None:
                self._timer = asyncio.get_running_loop().call_later(delay, self._admit)


async def _recheck(one: Upstream) -> None:
    error = await one.check()
    one.is_reachable = error is None or error.reason not in {"connect_failed", "connection_lost"}
    if not one.is_reachable and one.gate.breaker.tripped:  # else a call has succeeded meanwhile
        one.gate.breaker.record_probe()
