"""The gate in front of a backend: the calls let through when it works, is away, and is back."""

import asyncio
from datetime import timedelta

from structlog.testing import capture_logs

from imstream.ai.call_gate import MIN_RATE, CallGate
from imstream.ai.router import Backends
from imstream.errors import BackendError, FailureKind
from imstream.settings import Settings
from tests.support.virtual_time import in_virtual_time

FAILURES, PAUSE = 3, 2.0


def make_backend() -> tuple[CallGate, "Backend"]:
    settings = Settings.load(ai_breaker_failures=FAILURES, ai_breaker_pause=PAUSE, retry_wait_max=8, concurrency=1000)
    backends = Backends(settings)
    [upstream] = backends
    return upstream.gate, Backend(backends, upstream.gate)


def failure(reason: str = "connect_failed", kind: FailureKind = "away") -> BackendError:
    return BackendError(reason, "why", kind=kind)


def break_down(gate: CallGate) -> None:
    for _ in range(FAILURES):
        gate.record_failure(failure(), user=10001, period=gate.period)
    assert gate.breaker.tripped


class Backend:
    """A backend that is away until the test ends that, and its callers."""

    def __init__(self, backends: Backends, gate: CallGate) -> None:
        self.backends = backends
        self.gate = gate
        self.away = True
        self.called_at = list[tuple[float, int]]()

    async def enter(self) -> None:
        """Begin a call, which ends at once."""
        self.backends.release(self.backends.take() or await self.backends.wait())

    async def call(self, number: int) -> None:
        """Call until it is answered."""
        while True:
            await self.enter()
            period = self.gate.period
            self.called_at.append((asyncio.get_running_loop().time(), number))
            if not self.away:
                self.gate.record_success()
                return
            self.gate.record_failure(failure(), user=number, period=period)


@in_virtual_time
async def test_while_the_backend_works_nothing_waits() -> None:
    gate, backend = make_backend()
    for _ in range(1000):
        await backend.enter()
        gate.record_success()
    assert asyncio.get_running_loop().time() == 0


@in_virtual_time
async def test_the_log_has_the_absence_and_return_of_a_backend_with_the_reason_and_the_times() -> None:
    gate, backend = make_backend()
    with capture_logs() as lines:
        break_down(gate)
        assert gate.reason == "connect_failed"
        for pause in (PAUSE, 2 * PAUSE):
            await asyncio.sleep(pause)
            await backend.enter()
            gate.record_failure(failure(), user=10001, period=gate.period)
        await asyncio.sleep(60)
        gate.record_success()
    away, back = lines
    assert (away["event"], away["reason"], away["error"]) == ("backend is away", "connect_failed", "why")
    assert away["pause_seconds"] == PAUSE
    assert (back["event"], back["reason"]) == ("backend is back", "connect_failed")
    assert back["away_seconds"] == 60 + 3 * PAUSE
    assert gate.reason is None


@in_virtual_time
async def test_a_misconfigured_backend_that_is_still_called_is_logged_without_a_pause() -> None:
    gate, _ = make_backend()
    with capture_logs() as lines:
        gate.record_failure(failure("model_not_found", "misconfigured"), user=10001, period=gate.period)
    assert lines[0]["event"] == "backend is misconfigured"
    assert "pause_seconds" not in lines[0]


@in_virtual_time
async def test_while_it_is_away_one_call_is_made_in_each_pause_by_the_one_that_waits_longest() -> None:
    gate, backend = make_backend()
    break_down(gate)
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(backend.call(number))
        await asyncio.sleep(29)
        assert backend.backends.waiting == 4
        backend.away = False
    probes = [(at, number) for at, number in backend.called_at if at < 29]
    assert [at for at, _ in probes] == [2, 6, 10, 14, 18, 22, 26]
    assert [number for _, number in probes] == [0, 1, 2, 3, 0, 1, 2]
    assert backend.backends.waiting == 0


@in_virtual_time
async def test_when_it_is_back_the_first_second_sees_at_most_twice_the_calls_of_a_normal_one() -> None:
    gate, backend = make_backend()
    normal = 5
    for _ in range(60 * normal):
        await backend.enter()
        gate.record_success()
        await asyncio.sleep(1 / normal)
    break_down(gate)
    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(backend.call(number))
        await asyncio.sleep(20)
        backend.away = False
    [*_, first_success] = sorted(at for at, _ in backend.called_at)[:-199]
    in_first_second = [at for at, _ in backend.called_at if first_success <= at < first_success + 1]
    assert normal <= len(in_first_second) <= 2 * normal
    assert max(at for at, _ in backend.called_at) - first_success < 10
    await asyncio.sleep(20)
    before = asyncio.get_running_loop().time()
    await backend.enter()
    assert not gate.is_closed
    assert asyncio.get_running_loop().time() == before


@in_virtual_time
async def test_a_node_that_has_never_called_it_begins_slowly() -> None:
    gate, backend = make_backend()
    break_down(gate)
    backend.away = False
    async with asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(backend.call(number))
    times = sorted(at for at, _ in backend.called_at)
    assert len([at for at in times if at < times[0] + 1]) <= MIN_RATE + 1
    assert times[-1] - times[0] < 6


@in_virtual_time
async def test_a_caller_that_gives_up_delays_no_other() -> None:
    gate, backend = make_backend()
    break_down(gate)
    first = asyncio.create_task(backend.call(0))
    second = asyncio.create_task(backend.call(1))
    await asyncio.sleep(0.5)
    first.cancel()
    backend.away = False
    await second
    assert [number for _, number in backend.called_at] == [1]
    assert backend.backends.waiting == 0


@in_virtual_time
async def test_only_a_backend_that_is_away_closes_the_gate() -> None:
    gate, _ = make_backend()
    for kind in ("broken", "impossible"):
        for number in range(10):
            gate.record_failure(failure("http_400", kind), user=number, period=gate.period)
    assert not gate.is_closed
    for _ in range(10):
        gate.record_failure(failure("first_token_timeout"), user="one", period=gate.period)
    assert not gate.is_closed
    for user in ("two", "three"):
        gate.record_failure(failure("first_token_timeout"), user=user, period=gate.period)
    assert gate.is_closed


@in_virtual_time
async def test_a_call_that_began_before_the_backend_was_away_or_back_and_fails_late_is_not_counted() -> None:
    gate, _ = make_backend()
    before = gate.period
    break_down(gate)
    during = gate.period
    await asyncio.sleep(PAUSE)
    with capture_logs() as lines:
        gate.record_failure(failure(), user="late", period=before)
        assert gate.delay() == 0  # a call may try it
        gate.record_success()
        for period in (before, during):
            for number in range(FAILURES):
                gate.record_failure(failure("invalid_key", "misconfigured"), user=number, period=period)
    assert gate.state == "recovering"
    assert [line["event"] for line in lines] == ["backend is back"]


@in_virtual_time
async def test_a_call_that_fails_late_still_has_its_retry_after() -> None:
    gate, _ = make_backend()
    before = gate.period
    break_down(gate)
    gate.record_success()
    asked = BackendError("http_429", kind="away", retry_after=timedelta(seconds=7))
    gate.record_failure(asked, user="late", period=before)
    assert (gate.state, gate.delay()) == ("away", 7)
