"""Node and Redis are stopped together during an answer, again and again, as a process manager does."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from imstream.demo.answer import canned_answer
from imstream.keys import Keys
from tests.support.one_node import OneNode, one_node
from tests.support.peer import Told
from tests.support.servers import DemoBackend
from tests.support.stage import fresh_redis
from tests.support.waiting import wait_until

USER = 10001
ROUNDS = 10
QUESTION = f"a long story [[demo first=0 length=150 pace=10ms stall={ROUNDS}]]"
"""Only the last call ends: a slow machine has as much time to stop the others as it needs."""


async def interrupt_an_answer(node: OneNode, stop: Callable[[], Awaitable[None]]) -> None:
    """Stop the node `ROUNDS` times during one answer; check that it is complete in the end."""
    told = Told()
    for number in range(ROUNDS):
        async with node.peer(USER, resume={"m1": told} if number else None) as someone:
            if number == 0:
                await someone.chat(USER, QUESTION, "m1")
            await someone.until(event="delta", attempt=number + 1)
            told = someone.told["m1"]
            await stop()
        await node.start()
    async with node.peer(USER, resume={"m1": told}) as someone:
        assert (await someone.end_of("m1")).text == "".join(canned_answer(QUESTION))
    await node.settled()
    assert node.dead() == []


@pytest.mark.long
@pytest.mark.parametrize("first", ["redis", "node"])
async def test_an_answer_during_which_everything_is_stopped_ten_times_is_made_in_the_end(
    first: str, demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path) as server:
        async with one_node(tmp_path, server, demo.url, drain_grace="300ms", max_deliveries=1) as node:

            async def stop() -> None:
                assert server.process is not None
                processes = [server.process, node.now.process]
                for process in processes if first == "redis" else processes[::-1]:
                    process.signal(signal.SIGTERM)
                await asyncio.gather(*(asyncio.to_thread(process.wait) for process in processes))
                server.process = None
                await asyncio.to_thread(server.start)

            await interrupt_an_answer(node, stop)


@pytest.mark.long
async def test_a_node_that_is_killed_in_its_grace_ten_times_has_not_died(demo: DemoBackend, tmp_path: Path) -> None:
    with fresh_redis(tmp_path) as server:
        # The next process finds the lease, and takes it over at once, because its holder is dead.
        async with one_node(tmp_path, server, demo.url, drain_grace="30s", max_deliveries=1, lease="60s") as node:

            def stop_is_recorded() -> bool:
                """Whether the lease says so, and the delivery no longer counts: two steps, in any order."""
                uncounted = [entry["times_delivered"] for entry in node.pending()] == [0]
                return uncounted and "stopping" in str(node.redis.get(Keys().lease("0")))

            async def stop() -> None:
                node.now.process.signal(signal.SIGTERM)
                await wait_until(stop_is_recorded, "the stop is recorded")
                await node.killed()

            await interrupt_an_answer(node, stop)
