"""A node killed with SIGKILL in the middle of answers and started again finishes them."""

import asyncio
from pathlib import Path

from imstream.demo.answer import canned_answer
from tests.support.one_node import one_node
from tests.support.peer import all_answered
from tests.support.servers import DemoBackend, RedisServer
from tests.support.waiting import wait_until

ASKED = {
    10001 + n: {
        f"m{k}": f"user {n}, number {k} [[demo first=0 length={20 + 25 * n + 10 * k} pace=10ms]]" for k in (0, 1)
    }
    for n in range(8)
}
"""Answers of 20 to 205 deltas: at a concurrency of 6, a kill finds some ended, some running and some waiting."""


async def test_a_killed_node_that_is_started_again_finishes_what_it_had(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url, concurrency=6, flush_interval="20ms") as node:
        before = node.ai_stats()["calls"]
        asking = asyncio.create_task(all_answered(node.now.ws(), ASKED))
        for ended in (2, 5):
            await wait_until(lambda least=ended: node.ended() >= least, "some have ended")
            assert node.pending()
            assert node.ended() < 12
            await node.killed()
            await node.start()
        told = await asking
        await node.settled()

        for (user, message_id), one in told.items():
            whole = "".join(canned_answer(ASKED[user][message_id]))
            assert one.text == whole
            assert one.events[-1] == "done"
            assert node.recorded(user, message_id) == ("done", whole)
        restarted = [one for one in told.values() if "restart" in one.events]
        assert restarted  # some were interrupted, and their clients saw a restart
        assert all(one.attempt >= 2 for one in restarted)
        # Each kill costs one more AI call for each running answer, and none for ended or waiting ones.
        assert node.ai_stats()["calls"] - before <= len(told) + 2 * 6
