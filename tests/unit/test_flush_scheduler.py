"""Sockets are flushed at once while that takes little of the time, else together. In virtual time."""

import asyncio

from imstream.gateway.flush_scheduler import CPU_SHARE, INTERVAL, MAX_DEBT, FlushScheduler
from tests.support.virtual_time import in_virtual_time

LITTLE, MUCH = CPU_SHARE / 2, CPU_SHARE * 2
"""Shares of the time that rounds take if each flush has one of its own."""


class Caller:
    """Schedules flushes that take `cost` seconds of a clock of their own, and records when they are called."""

    def __init__(self, cost: float = 0.0) -> None:
        self.cost = cost
        self._used = 0.0
        self._scheduler = FlushScheduler(clock=lambda: self._used)
        self._loop = asyncio.get_running_loop()
        self.called: list[float] = []

    def schedule(self, *, urgent: bool = False) -> asyncio.Future[float]:
        """Schedule one flush; its delay, once it is called."""
        began, delay = self._loop.time(), self._loop.create_future()

        def flush() -> None:
            self._used += self.cost
            self.called.append(self._loop.time())
            delay.set_result(round(self._loop.time() - began, 6))

        self._scheduler.schedule(flush, urgent=urgent)
        return delay

    def flush(self) -> None:
        """Have everything called that is scheduled."""
        self._scheduler.flush()

    async def schedule_each(self, pause: float, times: int) -> list[float]:
        """Schedule `times` flushes with a pause after each; the delay of each, in order."""
        delays = []
        for _ in range(times):
            delays.append(self.schedule())
            await asyncio.sleep(pause)
        return await asyncio.gather(*delays)


@in_virtual_time
async def test_all_that_is_scheduled_in_one_turn_is_called_in_the_next_in_order() -> None:
    scheduler, called = FlushScheduler(clock=lambda: 0.0), list[str]()
    scheduler.schedule(lambda: called.append("a"))
    scheduler.schedule(lambda: called.append("b"), urgent=True)
    assert called == []
    await asyncio.sleep(0)
    assert called == ["a", "b"]


@in_virtual_time
async def test_however_many_rounds_there_are_nothing_waits_while_they_take_little_of_the_time() -> None:
    assert await Caller(cost=0.0005 * LITTLE).schedule_each(0.0005, times=1000) == [0] * 1000


@in_virtual_time
async def test_a_short_burst_of_work_makes_nothing_wait() -> None:
    assert await Caller(cost=0.9 * INTERVAL * CPU_SHARE / 6).schedule_each(0, times=6) == [0] * 6


@in_virtual_time
async def test_flushes_share_rounds_when_they_take_much_of_the_time() -> None:
    caller = Caller(cost=0.001 * MUCH)
    delays = await caller.schedule_each(0.001, times=400)
    assert max(delays) <= round(INTERVAL, 6)
    assert len(set(caller.called[-200:])) <= 200 * 0.001 / INTERVAL + 1


@in_virtual_time
async def test_urgent_writes_wait_for_no_round_and_flush_nothing_else() -> None:
    caller = Caller(cost=0.001 * MUCH)
    await caller.schedule_each(0.001, times=100)
    other = caller.schedule()
    assert await caller.schedule(urgent=True) == 0
    assert not other.done()
    assert 0 < await other <= INTERVAL


@in_virtual_time
async def test_a_caller_that_has_many_flushes_together_can_have_them_now() -> None:
    caller = Caller(cost=0.001 * MUCH)
    await caller.schedule_each(0.001, times=100)
    delays = [caller.schedule() for _ in range(3)]
    caller.flush()
    assert await asyncio.gather(*delays) == [0] * 3
    assert 0 < await caller.schedule() <= INTERVAL


@in_virtual_time
async def test_soon_after_a_long_round_nothing_waits() -> None:
    caller = Caller(cost=10.0)
    assert await caller.schedule() == 0
    caller.cost = 0.0
    assert await caller.schedule() > 0
    await asyncio.sleep(MAX_DEBT)
    assert await caller.schedule_each(0, times=3) == [0] * 3


@in_virtual_time
async def test_writes_scheduled_within_a_round_are_called_in_another() -> None:
    scheduler, called = FlushScheduler(clock=lambda: 0.0), list[str]()

    def first() -> None:
        called.append("first")
        scheduler.schedule(lambda: called.append("again"))

    scheduler.schedule(first)
    await asyncio.sleep(0)
    assert called == ["first"]
    await asyncio.sleep(0)
    assert called == ["first", "again"]
