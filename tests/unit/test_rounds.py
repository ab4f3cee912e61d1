"""Sockets are written in rounds: at once when the last is long ago, else together."""

from __future__ import annotations

import asyncio

from imstream.gateway.rounds import Rounds
from tests.support.waiting import wait_until

FAR = 3600.0


async def test_the_first_to_join_are_called_in_the_next_tick_in_order() -> None:
    rounds, called = Rounds(apart=FAR), list[str]()
    rounds.join(lambda: called.append("a"))
    rounds.join(lambda: called.append("b"))
    assert called == []
    await asyncio.sleep(0)
    assert called == ["a", "b"]


async def test_who_joins_just_after_a_round_waits_for_the_next() -> None:
    rounds, called = Rounds(apart=0.05), list[float]()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        rounds.join(lambda: called.append(loop.time()))
        rounds.join(lambda: called.append(loop.time()))
        await asyncio.sleep(0)
    assert len(called) == 2
    await wait_until(lambda: len(called) == 4, "the next round")
    assert called[2] - called[1] >= 0.04


async def test_who_joins_within_a_round_is_called_in_another() -> None:
    rounds, called = Rounds(apart=0), list[str]()

    def first() -> None:
        called.append("first")
        rounds.join(lambda: called.append("again"))

    rounds.join(first)
    await asyncio.sleep(0)
    assert called == ["first"]
    await wait_until(lambda: called == ["first", "again"], "the next round")
