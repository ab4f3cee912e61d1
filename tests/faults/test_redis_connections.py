"""There are few, slow connections to Redis, or Redis accepts no further ones."""

import asyncio
from pathlib import Path

from imstream.codes import Code, Event
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, fresh_redis, stage
from tests.support.tcp_proxy import tcp_proxy

BACK_WITHIN = 5.0


async def test_many_chats_at_once_share_one_slow_connection_and_none_waits_beyond_its_time_limit(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        stage(
            *(redis_server, demo, tmp_path),
            redis_url=proxy.url,
            redis_connections=1,
            redis_timeout="1s",
            queue_limit=1000,
        ) as play,
    ):
        users = await asyncio.gather(*(play.user(10001 + number) for number in range(50)))
        proxy.delay = 0.1
        # With one round trip a command, the admissions alone would take 20 s.
        asked = [user.ask(f"m{n}", f"one of many {AT_ONCE}") for user in users for n in range(4)]
        assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
        await play.curtain()
        assert play.ai_calls() == len(asked)
        assert play.node.connections_to(proxy.port) == 3, "one for commands, two that wait"


async def test_a_redis_that_takes_no_more_connections_means_unavailable_until_it_does(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path) as server:
        async with stage(server, demo, tmp_path) as play:
            user = await play.user()
            assert await user.ask("running", "who is running?") == Event.ACCEPTED
            await user.grown("running")
            play.redis.config_set("maxclients", 1)
            play.redis.client_kill_filter(_type="normal", skipme=True)
            await play.node.becomes(503, limit=BACK_WITHIN)
            for n in range(8):  # more than there are connections
                assert await user.ask(f"m{n}", f"is there room? {AT_ONCE}") == Code.UNAVAILABLE
            play.redis.config_set("maxclients", 1000)
            await play.node.becomes(200, limit=BACK_WITHIN)
            assert await user.ended("running") == "done"
            assert await user.ask("m0", f"is there room? {AT_ONCE}") == Event.ACCEPTED
            assert await user.ended("m0") == "done"
            assert play.ai_calls() == 2
