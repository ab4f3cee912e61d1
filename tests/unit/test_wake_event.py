"""The event for one waiter."""

from __future__ import annotations

import asyncio

import pytest

from imstream.gateway.wake_event import WakeEvent


@pytest.fixture
async def bell() -> WakeEvent:
    return WakeEvent(asyncio.get_running_loop())


async def waiting(bell: WakeEvent) -> asyncio.Task[None]:
    """Somebody who waits already."""
    task = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    return task


async def test_it_wakes_who_waits(bell: WakeEvent) -> None:
    task = await waiting(bell)
    assert not task.done()
    bell.ring()
    await task


async def test_a_ring_that_nobody_heard_is_kept_for_the_next_one(bell: WakeEvent) -> None:
    bell.ring()
    await bell.wait()


async def test_it_is_silent_again_after_each_wake(bell: WakeEvent) -> None:
    for _ in range(3):
        bell.ring()
    await bell.wait()
    task = await waiting(bell)
    assert not task.done()
    bell.ring()
    await task


async def test_many_rings_before_the_waiter_runs_are_one(bell: WakeEvent) -> None:
    task = await waiting(bell)
    bell.ring()
    bell.ring()
    await task
    second = await waiting(bell)
    assert not second.done()
    second.cancel()


async def test_a_waiter_that_gave_up_leaves_it_usable(bell: WakeEvent) -> None:
    task = await waiting(bell)
    task.cancel()
    bell.ring()  # before the waiter has run: it meets a cancelled future
    with pytest.raises(asyncio.CancelledError):
        await task
    await bell.wait()
