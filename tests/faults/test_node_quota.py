"""A node dies between counting a message and its end; Redis is down during a login."""

from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed

from imstream.keys import Keys
from imstream.texts import Text
from tests.support.noon import NOON, today
from tests.support.one_node import OneNode, one_node
from tests.support.peer import Frame, Peer, peer
from tests.support.scripted_backend import refuses, scripted_backend, streams
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import fresh_redis
from tests.support.waiting import wait_until

USER = 10001
QUOTA: dict[str, Any] = {"daily_quota": 1, "quota_timezone": NOON}


def counted(node: OneNode) -> list[str]:
    """The ids of the messages counted today."""
    found: Any = node.redis.zrange(Keys().quota(USER, today()), 0, -1)
    return list(found)


async def asks_until_it_dies(node: OneNode, message_id: str) -> None:
    """Send a message and wait until the node dies."""
    async with node.peer(USER) as someone:
        await someone.send_frame("CHAT", userId=USER, contents="hello", messageId=message_id)
        try:
            while True:
                await someone.frame()
        except ConnectionClosed:
            pass
    assert await node.died() == -9


async def answer_to_init(someone: Peer, user: int) -> Frame:
    """Log in, repeatedly while Redis is down; the first other response."""
    while True:
        await someone.send_frame("INIT", userId=user)
        frame = await someone.frame()
        if frame["code"] != "UNAVAILABLE":
            return frame


async def test_a_message_that_was_counted_by_a_node_that_then_died_passes_again_and_is_counted_once(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=streams("hello")) as backend,
        one_node(tmp_path, redis_server, backend.url, crash_at="counted", **QUOTA) as node,
    ):
        await asks_until_it_dies(node, "m1")
        assert (counted(node), node.unfinished()) == (["m1"], 0)
        await node.start()
        async with node.peer(USER) as someone:
            assert (await someone.chat(USER, "hello", "m2"))["code"] == "RATE_LIMITED"
            accepted = await someone.chat(USER, "hello", "m1")
            assert (accepted["event"], accepted["remaining"]) == ("accepted", 0)
            assert (await someone.end_of("m1")).events[-1] == "done"
        await node.settled()
        assert counted(node) == ["m1"]


async def test_a_failed_message_is_given_back_also_when_its_node_dies_before_that(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=refuses(400)) as backend,
        one_node(tmp_path, redis_server, backend.url, crash_at="giving-back", **QUOTA) as node,
    ):
        await asks_until_it_dies(node, "m1")
        assert (counted(node), node.recorded(USER, "m1")[0]) == (["m1"], "failed")
        await node.start(crash_at="burying", wait=False)  # uncounted, then the node dies again before it records that
        assert await node.died() == -9
        assert counted(node) == []
        await node.start()
        await wait_until(lambda: len(node.dead()) == 1, "the message is a dead letter")
        async with node.peer(USER) as someone:
            # Sent again, its recorded end is shown, and it is not counted.
            again = await someone.chat(USER, "hello", "m1")
            assert (again["event"], again["remaining"]) == ("accepted", 1)
            assert (await someone.end_of("m1")).events[-1] == "failed"
            assert (await someone.chat(USER, "hello", "m2"))["remaining"] == 0
            await someone.end_of("m2")
        await node.settled()
        await wait_until(lambda: counted(node) == [], "both are uncounted")


async def test_while_redis_is_away_nobody_comes_in_and_a_banned_user_does_not_when_it_is_back(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path) as server:
        async with one_node(tmp_path, server, demo.url, redis_timeout="500ms") as node:
            node.redis.hset(Keys().account(USER), "banned", 1)
            async with peer(node.now.ws(USER), lang="en") as banned, peer(node.now.ws(USER + 1), lang="en") as free:
                server.kill()
                for someone, user in ((banned, USER), (free, USER + 1)):
                    await someone.send_frame("INIT", userId=user)
                    refusal = await someone.frame()
                    assert (refusal["code"], refusal["contents"]) == ("UNAVAILABLE", Text.UNAVAILABLE.en)
                    assert refusal["retryAfterMs"] > 0
                    await someone.send_frame("CHAT", userId=user, contents="hello", messageId="m")
                    assert (await someone.frame())["code"] == "FORBIDDEN"
                server.start()
                assert (await answer_to_init(free, USER + 1))["msgType"] == "INIT"
                assert (await answer_to_init(banned, USER))["code"] == "FORBIDDEN"
                assert await banned.closed() == 4503
            node.redis.delete(Keys().account(USER))
