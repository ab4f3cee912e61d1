"""Sockets are flushed at once while the node is quiet, else together. In virtual time."""

import asyncio
import itertools

from imstream.gateway.flush_scheduler import FlushScheduler
from tests.support.virtual_time import in_virtual_time


class Caller:
    """Schedules flushes, and records when they are called."""

    def __init__(self, scheduler: FlushScheduler) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self.called: list[float] = []

    def schedule(self) -> None:
        """Schedule one flush."""
        self._scheduler.schedule(lambda: self.called.append(round(self._loop.time(), 6)))

    async def schedule_each(self, pause: float, times: int) -> list[float]:
        """Schedule `times` flushes with a pause after each; the delay of each, in order."""
        scheduled = []
        for _ in range(times):
            scheduled.append(self._loop.time())
            self.schedule()
            await asyncio.sleep(pause)
        await asyncio.sleep(10)
        return [round(called - at, 6) for called, at in zip(self.called, scheduled, strict=True)]


@in_virtual_time
async def test_all_who_join_in_one_tick_are_called_in_the_next_in_order() -> None:
    scheduler, called = FlushScheduler(), list[str]()
    scheduler.schedule(lambda: called.append("a"))
    scheduler.schedule(lambda: called.append("b"))
    assert called == []
    await asyncio.sleep(0)
    assert called == ["a", "b"]


@in_virtual_time
async def test_while_little_is_said_nobody_waits() -> None:
    caller = Caller(FlushScheduler(min_interval=1.0, quiet_rounds=4))
    assert await caller.schedule_each(0.25, times=40) == [0] * 40


@in_virtual_time
async def test_when_much_is_said_all_wait_for_rounds_of_many() -> None:
    caller = Caller(FlushScheduler(min_interval=1.0, quiet_rounds=2))
    waits = await caller.schedule_each(0.125, times=32)
    assert waits[:2] == [0, 0]
    assert max(waits) <= 1
    assert sorted(set(caller.called[2:])) == [1.0, 2.0, 3.0, 4.0]


@in_virtual_time
async def test_rounds_that_cost_much_are_further_apart_up_to_a_limit() -> None:
    for cost, apart in ((0.1, 1.0), (0.5, 3.0), (2.0, 8.0)):  # rounds take a sixth of the time
        readings = itertools.count(0, cost)  # read before and after a round
        caller = Caller(FlushScheduler(min_interval=1.0, max_interval=8.0, quiet_rounds=1, clock=readings.__next__))
        await caller.schedule_each(0.125, times=300)
        rounds = sorted(set(caller.called[2:]))
        assert {round(after - before, 6) for before, after in itertools.pairwise(rounds)} == {apart}


@in_virtual_time
async def test_after_a_quiet_time_nobody_waits_again() -> None:
    caller = Caller(FlushScheduler(min_interval=1.0, quiet_rounds=1))
    await caller.schedule_each(0.125, times=10)
    caller.called.clear()
    assert await caller.schedule_each(2.0, times=3) == [0, 0, 0]


@in_virtual_time
async def test_who_joins_within_a_round_is_called_in_another() -> None:
    scheduler, called = FlushScheduler(min_interval=1.0, quiet_rounds=1), list[str]()

    def first() -> None:
        called.append("first")
        scheduler.schedule(lambda: called.append("again"))

    scheduler.schedule(first)
    await asyncio.sleep(0)
    assert called == ["first"]
    await asyncio.sleep(1)
    assert called == ["first", "again"]
