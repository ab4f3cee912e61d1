"""Redis dies or hangs under several nodes: none declares others dead, and all recover by themselves."""

import asyncio
import time
from pathlib import Path

from imstream.codes import Code, Event
from tests.support.chatter import chatter
from tests.support.many_nodes import becomes, many_nodes
from tests.support.servers import DemoBackend
from tests.support.stage import expected
from tests.support.waiting import wait_until

USER = 10001

BACK_WITHIN = 5.0
"""Maximum seconds from the return of Redis to that of the nodes: two, and a margin for a busy machine."""

SLOWLY = "[[demo first=0 pace=20ms length=150]]"
NAMES = ("a", "b", "c")


async def passed(seconds: float) -> None:
    """Wait for a part of the fault: the end of a lease cannot be observed while Redis is dead."""
    end = time.monotonic() + seconds
    await wait_until(lambda: time.monotonic() > end, "time has passed")


async def test_nodes_that_lose_redis_for_longer_than_a_lease_go_on_with_their_own_work_when_it_is_back(
    demo: DemoBackend, tmp_path: Path
) -> None:
    async with many_nodes(tmp_path, demo.url, *NAMES, redis_timeout="500ms", sweep_interval="1m") as nodes:
        message_id = "outage"
        async with (
            chatter(nodes["a"].now.ws(USER), USER) as one,
            chatter(nodes["b"].now.ws(USER + 1), USER + 1) as two,
            chatter(nodes["c"].now.ws(USER + 2), USER + 2) as three,
        ):
            users = (one, two, three)
            asked = [user.ask(message_id, f"{user.user_id} {SLOWLY}") for user in users]
            assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
            await asyncio.gather(*(user.grown(message_id) for user in users))
            nodes.server.kill()
            refused = [user.ask("dead", "while it is dead") for user in users]
            assert set(await asyncio.gather(*refused)) == {Code.UNAVAILABLE}
            await passed(1.2)
            await asyncio.to_thread(nodes.server.start)
            await asyncio.gather(*(becomes(node, None, limit=BACK_WITHIN) for node in nodes.nodes.values()))
            for user in users:
                await user.ask_until_accepted("dead", "while it is dead")
                assert await user.ended("dead") == "done"
                assert await user.ended(message_id) == "done"
                assert user.text(message_id) == expected(f"{user.user_id} {SLOWLY}")
        for user in users:
            assert len(nodes.opened_by(user.user_id, message_id)) == 1, "nothing is taken from living nodes"
        await nodes.settled()
