"""The time limits of one call: which one ends it, and when; they leave no timer and no reference."""

import asyncio
from datetime import timedelta

import pytest

from imstream.ai.time_limits import TimeLimits
from imstream.errors import BackendError
from tests.support.virtual_time import in_virtual_time


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def end_of(
    *expectations: tuple[str, float], total: float, renewed_at: tuple[float, ...] = ()
) -> tuple[str, float]:
    """The reason and the time of the end of a call that hangs."""

    async def hang() -> None:
        async with TimeLimits(total=seconds(total)) as limits:
            for reason, within in expectations:
                limits.expect(reason, within=seconds(within))
            for moment in renewed_at:
                await asyncio.sleep(moment - asyncio.get_running_loop().time())
                limits.renew()
            await never()

    with pytest.raises(BackendError) as caught:
        await hang()
    return caught.value.reason, round(asyncio.get_running_loop().time(), 6)


@in_virtual_time
async def test_the_total_ends_a_call_of_which_nothing_else_is_expected() -> None:
    assert await end_of(total=10) == ("total_timeout", 10)


@in_virtual_time
async def test_what_is_expected_sooner_than_the_total_ends_the_call() -> None:
    assert await end_of(("first", 3), total=10) == ("first", 3)


@in_virtual_time
async def test_what_is_expected_later_than_the_total_does_not() -> None:
    assert await end_of(("first", 30), total=10) == ("total_timeout", 10)


@in_virtual_time
async def test_a_newer_expectation_that_is_sooner_replaces_the_older() -> None:
    assert await end_of(("first", 8), ("second", 3), total=10) == ("second", 3)


@in_virtual_time
async def test_a_newer_expectation_that_is_later_replaces_the_older() -> None:
    assert await end_of(("first", 3), ("second", 8), total=10) == ("second", 8)


@in_virtual_time
async def test_silence_is_counted_from_the_last_renewal() -> None:
    assert await end_of(("idle", 3), total=100, renewed_at=(2, 4.5, 7, 9, 9.25)) == ("idle", 12.25)


@in_virtual_time
async def test_renewals_do_not_move_the_total() -> None:
    assert await end_of(("idle", 3), total=10, renewed_at=(2, 4, 6, 8)) == ("total_timeout", 10)


async def end_of_queueing(*, at_most: float, total: float = 100) -> tuple[str, float]:
    """The reason and the time of the end of a call that renews its first limit, of 3 s, every 2 s."""

    async def queue() -> None:
        async with TimeLimits(total=seconds(total)) as limits:
            limits.expect("first", within=seconds(3), at_most=seconds(at_most))
            while True:
                await asyncio.sleep(2)
                limits.renew()

    with pytest.raises(BackendError) as caught:
        await queue()
    return str(caught.value), asyncio.get_running_loop().time()


@in_virtual_time
async def test_renewals_do_not_move_the_limit_of_the_whole_step() -> None:
    assert await end_of_queueing(at_most=9) == ("first: after 9 s", 9)


@in_virtual_time
async def test_the_limit_of_a_step_does_not_move_the_total() -> None:
    assert await end_of_queueing(at_most=9, total=5) == ("total_timeout: after 5 s", 5)


@in_virtual_time
async def test_the_limit_of_a_step_ends_with_the_step() -> None:
    async with TimeLimits(total=seconds(100)) as limits:
        limits.expect("first", within=seconds(3), at_most=seconds(5))
        await asyncio.sleep(2)
        limits.expect("second", within=seconds(10))
        await asyncio.sleep(9)


@in_virtual_time
async def test_the_error_says_how_long_was_waited() -> None:
    with pytest.raises(BackendError, match=r"^total_timeout: after 1.5 s$"):
        async with TimeLimits(total=seconds(1.5)):
            await never()


@in_virtual_time
async def test_a_stopped_limit_lets_everything_take_its_time() -> None:
    async with TimeLimits(total=seconds(2)) as limits:
        limits.expect("first", within=seconds(1))
        limits.stop()
        limits.expect("second", within=seconds(1))
        await asyncio.sleep(60)


@in_virtual_time
async def test_a_call_that_ended_leaves_no_timer() -> None:
    async with TimeLimits(total=seconds(2)) as limits:
        limits.expect("first", within=seconds(1))
    await asyncio.sleep(60)


@in_virtual_time
async def test_other_errors_pass_unchanged() -> None:
    for error in (BackendError("x", kind="impossible"), TimeoutError("own"), ValueError("own")):
        with pytest.raises(type(error)) as caught:
            async with TimeLimits(total=seconds(2)):
                raise error
        assert caught.value is error


@in_virtual_time
async def test_cancelling_stays_cancelling() -> None:
    began = asyncio.Event()

    async def work() -> None:
        async with TimeLimits(total=seconds(60)):
            began.set()
            await never()

    task = asyncio.create_task(work())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@in_virtual_time
async def test_the_task_can_go_on_after_a_limit() -> None:
    await end_of(total=1)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(1)


@in_virtual_time
async def test_received_data_is_read_before_silence_is_found_too_long() -> None:
    async def silent_after_50_seconds() -> None:
        async with TimeLimits(total=seconds(100)) as limits:
            limits.expect("idle", within=seconds(3))
            limits.catch_up = limits.renew
            await asyncio.sleep(50)
            limits.catch_up = lambda: None
            await asyncio.sleep(50)

    with pytest.raises(BackendError, match="after 3 s"):
        await silent_after_50_seconds()
    assert 50 <= asyncio.get_running_loop().time() <= 54
