"""The event for one waiter."""

from __future__ import annotations

import asyncio

import pytest

from imstream.gateway.wake_event import WakeEvent


@pytest.fixture
async def event() -> WakeEvent:
    return WakeEvent()


async def waiting(event: WakeEvent) -> asyncio.Task[None]:
    """A task that waits already."""
    task = asyncio.create_task(event.wait())
    await asyncio.sleep(0)
    return task


async def test_it_wakes_who_waits(event: WakeEvent) -> None:
    task = await waiting(event)
    assert not task.done()
    event.set()
    await task


async def test_a_ring_that_nobody_heard_is_kept_for_the_next_one(event: WakeEvent) -> None:
    event.set()
    await event.wait()


async def test_it_is_silent_again_after_each_wake(event: WakeEvent) -> None:
    for _ in range(3):
        event.set()
    await event.wait()
    task = await waiting(event)
    assert not task.done()
    event.set()
    await task


async def test_many_rings_before_the_waiter_runs_are_one(event: WakeEvent) -> None:
    task = await waiting(event)
    event.set()
    event.set()
    await task
    second = await waiting(event)
    assert not second.done()
    second.cancel()


async def test_a_waiter_that_gave_up_leaves_it_usable(event: WakeEvent) -> None:
    task = await waiting(event)
    task.cancel()
    event.set()  # before the waiter has run: its future is cancelled
    with pytest.raises(asyncio.CancelledError):
        await task
    await event.wait()
