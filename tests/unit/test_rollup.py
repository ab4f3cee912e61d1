"""Connections to backends rest while the node is busy: how long, and in turns. In virtual time."""

import asyncio
import random
from collections import Counter
from datetime import timedelta
from unittest.mock import Mock

import pytest

from imstream.ai.rollup import BUSY, MEMORY, MIN_PERIOD, PER_ANSWER, QUIET, SAMPLE, SLOTS, TURN, RollUp
from tests.support.virtual_time import in_virtual_time

LIMIT = 0.040
PER_TURN = 25
COST = TURN / PER_TURN
"""CPU seconds of an answer, with which so many fill a turn."""

MANY = round(LIMIT / PER_ANSWER)
PACE = 0.005
"""Seconds between two reads of a connection that does not rest."""


class Answer:
    """The connection of an answer, on which text comes without a pause: it reads, and rests if it may."""

    slot = -1

    def __init__(self, node: "Node") -> None:
        self.read_at: list[float] = []
        self._node = node
        node.rollup.join(self)

    def wake(self) -> None:
        """Read, and rest again."""
        self._node.worked += self._node.cost
        self.read_at.append(round(asyncio.get_running_loop().time(), 6))
        if self._node.reads and not self._node.rollup.rest(self):
            asyncio.get_running_loop().call_later(PACE, self.wake)

    @property
    def rests(self) -> list[float]:
        """Seconds between the reads so far."""
        pairs = zip(self.read_at, self.read_at[1:], strict=False)
        return [round(after - before, 6) for before, after in pairs]


class Node:
    """A node whose thread takes a share of a CPU, and `cost` CPU seconds for each read."""

    def __init__(self, *, share: float, answers: int, limit: float = LIMIT, cost: float = 0.0) -> None:
        self.reads = True
        self.share = share
        self.cost = cost
        self.worked = 0.0
        self._used, self._since = 0.0, 0.0
        self.rollup = RollUp(timedelta(seconds=limit), cpu_clock=self._cpu)
        self.answers = [Answer(self) for _ in range(answers)]

    def _cpu(self) -> float:
        now = asyncio.get_running_loop().time()
        self._used, self._since = self._used + self.share * (now - self._since), now
        return self._used + self.worked

    async def rests(self) -> list[float]:
        """The shortest and the longest rest once it has been as busy for a while."""
        for answer in self.answers:
            answer.wake()
        await asyncio.sleep(SAMPLE * MEMORY * 8)
        self.reads = False
        rests = [rest for answer in self.answers for rest in answer.rests[-3:]]
        return [min(rests), max(rests)]

    def turns(self) -> list[int]:
        """The number of connections that were read together in each of the last turns."""
        return list(Counter(answer.read_at[-1] for answer in self.answers).values())


@in_virtual_time
async def test_connections_of_a_quiet_node_do_not_rest() -> None:
    assert await Node(share=QUIET, answers=MANY).rests() == [PACE] * 2


@in_virtual_time
async def test_connections_of_a_busy_node_rest_for_the_limit() -> None:
    assert await Node(share=BUSY, answers=MANY).rests() == pytest.approx([LIMIT] * 2, rel=0.01)


@in_virtual_time
async def test_the_rest_grows_with_the_cpu() -> None:
    for part in (0.5, 0.75):
        node = Node(share=QUIET + part * (BUSY - QUIET), answers=MANY)
        assert await node.rests() == pytest.approx([part * LIMIT] * 2, rel=0.01)


@in_virtual_time
async def test_the_rest_is_short_while_few_answers_are_under_way() -> None:
    assert await Node(share=1.0, answers=10).rests() == pytest.approx([10 * PER_ANSWER] * 2)
    assert await Node(share=1.0, answers=round(MIN_PERIOD / PER_ANSWER) - 1).rests() == [PACE] * 2


@in_virtual_time
async def test_without_a_limit_no_connection_rests() -> None:
    assert await Node(share=1.0, answers=MANY, limit=0).rests() == [PACE] * 2


@in_virtual_time
async def test_not_all_connections_are_read_together() -> None:
    node = Node(share=1.0, answers=PER_TURN * SLOTS, cost=COST)
    await node.rests()
    assert node.turns() == [PER_TURN] * SLOTS


@in_virtual_time
async def test_few_connections_are_read_together() -> None:
    for turns in (1, 2, 4):
        node = Node(share=1.0, answers=PER_TURN * turns - 1, cost=COST)
        await node.rests()
        assert len(node.turns()) == turns


@in_virtual_time
async def test_more_connections_are_read_together_when_that_takes_less_cpu() -> None:
    node = Node(share=1.0, answers=PER_TURN * 3, cost=COST / 10)
    await node.rests()
    assert node.turns() == [PER_TURN * 3]


@in_virtual_time
async def test_no_connection_rests_longer_than_the_limit_however_many_are_read_together() -> None:
    for answers in range(1, PER_TURN * SLOTS, 19):
        _, longest = await Node(share=1.0, answers=answers, cost=COST).rests()
        assert longest <= LIMIT * 1.001


@in_virtual_time
async def test_no_connection_rests_longer_than_the_limit_when_the_cost_of_an_answer_changes() -> None:
    for answers, cost in ((25, 0.00024), (50, 0.00012), (70, 0.0003)):
        node = Node(share=1.0, answers=answers)
        for answer in node.answers:
            answer.wake()
        await asyncio.sleep(SAMPLE * MEMORY * 8)
        begin = asyncio.get_running_loop().time()
        dice = random.Random(1)  # noqa: S311 - no secret
        while asyncio.get_running_loop().time() < begin + 2:
            node.cost = dice.uniform(0, 2 * cost)
            await asyncio.sleep(0.005)
        for answer in node.answers:
            assert max(answer.rests[-40:]) <= LIMIT * 1.001


@in_virtual_time
async def test_an_answer_that_fails_in_its_turn_delays_no_other() -> None:
    node = Node(share=1.0, answers=MANY)
    await node.rests()
    failing = node.answers[0]
    failing.wake = Mock(side_effect=ZeroDivisionError)  # type: ignore[method-assign]
    node.reads = True
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    for answer in node.answers:
        answer.read_at.clear()
        node.rollup.rest(answer)
    await asyncio.sleep(0.5)
    assert min(len(answer.read_at) for answer in node.answers[1:]) >= 0.5 / LIMIT - 2


@in_virtual_time
async def test_after_each_turn_its_caller_is_told() -> None:
    node, turns = Node(share=1.0, answers=PER_TURN * 2 - 1, cost=COST), list[float]()
    node.rollup.on_turn = lambda: turns.append(round(asyncio.get_running_loop().time(), 6))
    await node.rests()
    assert {read for answer in node.answers for read in answer.read_at[-3:]} <= {*turns}


@in_virtual_time
async def test_the_first_rest_is_never_longer_than_the_limit() -> None:
    node = Node(share=1.0, answers=MANY)
    await node.rests()
    node.reads = True
    late = Answer(node)
    late.wake()
    await asyncio.sleep(1)
    assert 0 < late.rests[0] <= LIMIT


@in_virtual_time
async def test_after_a_quiet_time_no_connection_rests() -> None:
    node = Node(share=1.0, answers=MANY)
    await node.rests()
    node.share = 0.0
    await asyncio.sleep(10)
    assert not node.rollup.rest(node.answers[0])


@in_virtual_time
async def test_an_answer_that_ends_while_it_rests_is_not_woken() -> None:
    node = Node(share=1.0, answers=MANY)
    await node.rests()
    await asyncio.sleep(1)
    ended, other = node.answers[:2]
    reads = len(ended.read_at), len(other.read_at)
    assert node.rollup.rest(ended)
    assert node.rollup.rest(other)
    node.rollup.leave(ended)
    await asyncio.sleep(1)
    assert (len(ended.read_at), len(other.read_at)) == (reads[0], reads[1] + 1)
