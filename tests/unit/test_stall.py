"""A stall of the event loop is detected, and time-outs are attributed to it."""

import asyncio

from structlog.testing import capture_logs
from structlog.typing import EventDict

from imstream.worker.lease_keeper import STALL_AFTERMATH, STALL_TICK, StallDetector
from tests.support.virtual_time import VirtualTimeLoop, in_virtual_time


async def _after(stall: float) -> tuple[list[bool], list[EventDict]]:
    """Whether a stall is reported before it, right after it, when it was detected, and later."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    watch = StallDetector(2.0)
    with capture_logs() as logs:
        watching = asyncio.create_task(watch.run())
        await asyncio.sleep(10)
        blamed = [watch.stalled_recently()]
        loop.now += stall  # as if the process had been frozen here
        blamed.append(watch.stalled_recently())
        await asyncio.sleep(0)
        await asyncio.sleep(STALL_TICK / 2)
        blamed.append(watch.stalled_recently())
        await asyncio.sleep(STALL_TICK + STALL_AFTERMATH)
        blamed.append(watch.stalled_recently())
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return blamed, logs


@in_virtual_time
async def test_a_loop_that_stood_still_is_the_cause_until_a_moment_after_and_is_logged_once() -> None:
    blamed, logs = await _after(16.0)
    assert blamed == [False, True, True, False]
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("warning", "event loop stood still: the process was frozen or had no CPU")
    ]
    assert 15 < logs[0]["seconds"] <= 16


@in_virtual_time
async def test_a_loop_that_is_only_late_is_not() -> None:
    assert await _after(1.0) == ([False] * 4, [])
