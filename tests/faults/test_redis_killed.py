"""Redis is killed, has not started yet, or has executed commands whose replies were lost."""

import asyncio
import signal
from pathlib import Path

from imstream.codes import Code, Event
from tests.support.processes import free_port
from tests.support.servers import DemoBackend, RedisServer, valkey_binary
from tests.support.stage import AT_ONCE, fresh_redis, stage
from tests.support.waiting import wait_until

BACK_WITHIN = 5.0
"""Seconds from Redis' return to the node's readiness: two are promised, and the machine may be busy."""


async def test_nothing_accepted_is_lost_when_redis_is_killed_and_comes_back_with_its_file(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path) as server:
        async with stage(server, demo, tmp_path, concurrency=4, user_limit=10) as play:
            users = [await play.user(10001 + number) for number in range(10)]
            asked = [user.ask(f"m{n}", f"before the death, {n}") for user in users for n in range(2)]
            assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
            await asyncio.gather(*(user.send("unsure", f"while it dies {AT_ONCE}") for user in users))
            await users[0].grown("m0")
            server.kill()
            await play.node.becomes(503, limit=BACK_WITHIN)
            assert await play.node.status("/healthz") == 200
            assert await users[0].ask("dead", "while it is dead") == Code.UNAVAILABLE

            server.start()
            await play.node.becomes(200, limit=BACK_WITHIN)
            # Commands in flight have an unknown outcome: clients resend with the same id.
            asked = [user.ask("unsure", f"while it dies {AT_ONCE}") for user in users]
            asked += [users[0].ask("dead", "while it is dead"), users[1].ask("new", "after its return")]
            assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
            await play.curtain()
            # Each at most once, although some were admitted twice.
            assert play.ai_calls() == len(users) * 3 + 2


async def test_a_message_whose_admission_timed_out_is_answered_once_when_it_is_sent_again(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path) as server:
        assert server.process is not None
        async with stage(server, demo, tmp_path) as play:
            user = await play.user()
            assert await user.ask("m0", f"so that there is a stream {AT_ONCE}") == Event.ACCEPTED
            server.process.signal(signal.SIGSTOP)
            assert await user.ask("m1", "was it admitted?") == Code.UNAVAILABLE
            server.process.signal(signal.SIGCONT)
            refusals = await user.ask_until_accepted("m1", "was it admitted?")
            assert await user.ended("m1") == "done"
            await play.curtain()
            # Whether Redis read the last commands before it stopped depends on the kernel and cannot be known.
            assert 2 <= play.admitted_ever() <= 3 + len(refusals)
            assert play.ai_calls() == 2


async def test_a_node_that_starts_before_redis_is_ready_when_redis_is(demo: DemoBackend, tmp_path: Path) -> None:
    server = RedisServer(valkey_binary(), free_port(), tmp_path / "redis")
    server.start()
    server.kill()
    try:
        async with stage(server, demo, tmp_path, wait=False) as play:
            await wait_until(lambda: play.node.status("/healthz"), "the node lives", limit=BACK_WITHIN)
            assert await play.node.status() == 503
            server.start()
            await play.node.becomes(200, limit=BACK_WITHIN)
            user = await play.user()
            assert await user.ask("m1", f"are you there? {AT_ONCE}") == Event.ACCEPTED
    finally:
        server.stop()
