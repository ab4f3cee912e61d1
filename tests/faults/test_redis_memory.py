"""Redis is out of memory, or is configured so that it may evict messages."""

import asyncio
import signal
from pathlib import Path
from typing import Any

from imstream.clock import now_ms
from imstream.codes import Code, Event
from tests.support.scraping import metrics_become
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, KEYS, Stage, fresh_redis, stage
from tests.support.waiting import wait_until

SLOWLY = "[[demo first=100ms pace=10ms]]"


def fill_memory(play: Stage) -> None:
    """Make Redis refuse every command that takes memory."""
    play.redis.config_set("maxmemory", 1)


def used_memory(play: Stage) -> int:
    """The memory that Redis has allocated, in bytes."""
    info: Any = play.redis.info("memory")
    return int(info["used_memory"])


def warned(play: Stage) -> list[str]:
    """Return the node's warnings, except the one about missing authentication."""
    return [event for event in play.node.logged("warning") if not event.startswith("users are not authenticated")]


def free_memory(play: Stage) -> None:
    """Let Redis accept every command again."""
    play.redis.config_set("maxmemory", 0)


async def test_a_full_redis_means_busy_while_what_was_accepted_is_answered_and_drained(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with stage(redis_server, demo, tmp_path, concurrency=4) as play:
        users = [await play.user(10001 + number) for number in range(8)]
        asked = [user.ask("before", f"before it was full {SLOWLY}") for user in users]
        assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
        assert warned(play) == []
        fill_memory(play)
        asked = [user.ask("while", f"while it is full {AT_ONCE}") for user in users]
        assert set(await asyncio.gather(*asked)) == {Code.BUSY}
        assert all("retryAfterMs" in user.frames["while"][-1] for user in users)
        for user in users:
            assert await user.ended("before") == "done"
        await wait_until(lambda: play.unfinished() == 0, "all that was accepted is drained")
        assert await play.node.status() == 200
        assert play.ai_calls() == len(users)

        free_memory(play)
        assert await users[0].ask("while", f"while it is full {AT_ONCE}") == Event.ACCEPTED
        assert await users[0].ended("while") == "done"


async def test_dead_letters_go_before_a_living_message_is_refused(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with stage(redis_server, demo, tmp_path) as play:
        user, dead = await play.user(), [KEYS.dead("0"), KEYS.dead("idle"), KEYS.dead("gone")]
        play.redis.zadd(KEYS.nodes(), {"idle": now_ms()})
        for number in range(300):
            play.redis.xadd(dead[number % 3], {"user": str(number), "contents": "x" * 50_000})
        play.redis.config_set("maxmemory", used_memory(play) - 2**20)
        assert await user.ask("m1", f"while letters fill it {AT_ONCE}") == Event.ACCEPTED
        assert await user.ended("m1") == "done"
        *known, gone = dead
        assert all(40 <= play.redis.xlen(key) <= 60 for key in known)
        assert warned(play) == ["dead letters dropped: redis is out of memory"]
        for key in known:
            play.redis.delete(key)
        await wait_until(lambda: play.redis.info("memory")["lazyfree_pending_objects"] == 0, "their memory is free")
        assert used_memory(play) < 10 * 2**20
        play.redis.config_set("maxmemory", used_memory(play) - 2**20)
        assert await user.ask("m2", f"while letters of a node that is gone fill it {AT_ONCE}") == Event.ACCEPTED
        assert await user.ended("m2") == "done"
        assert 40 <= play.redis.xlen(gone) <= 60
        play.redis.delete(gone)
        free_memory(play)
        counted = {"accepted": 2, "busy": 0}  # each message once, although it was tried twice
        wanted = {f'imstream_admissions_total{{result="{result}"}}': number for result, number in counted.items()}
        await metrics_become(f"http://127.0.0.1:{play.node.port}", wanted)


async def test_a_node_that_is_killed_while_redis_is_full_drains_when_it_is_started_again(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with stage(redis_server, demo, tmp_path, concurrency=2) as play:
        users = [await play.user(10001 + number) for number in range(4)]
        for user in users:
            assert await user.ask("m1", f"before it was full {SLOWLY}") == Event.ACCEPTED
        await users[0].grown("m1")
        fill_memory(play)
        play.node.process.signal(signal.SIGKILL)
        await play.start_node_again()
        await wait_until(lambda: play.unfinished() == 0, "all that was accepted is drained")
        free_memory(play)


async def test_a_node_warns_at_its_start_of_a_redis_that_may_lose_messages_and_says_what_to_set(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path, "--maxmemory-policy", "allkeys-lru", "--appendonly", "no") as server:
        async with stage(server, demo, tmp_path) as play:
            await wait_until(lambda: len(warned(play)) == 2, "two warnings")
            evicts, forgets = warned(play)
            assert evicts.endswith("set maxmemory-policy noeviction")
            assert forgets.endswith("set appendonly yes")
            user = await play.user()
            assert await user.ask("m1", f"it serves all the same {AT_ONCE}") == Event.ACCEPTED
