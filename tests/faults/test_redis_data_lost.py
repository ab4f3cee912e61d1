"""Redis loses data: FLUSHALL, a deleted stream, or a restart without persistence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imstream.codes import Event
from imstream.keys import GROUP, Keys
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, REQUESTS, Stage, expected, fresh_redis, stage
from tests.support.waiting import wait_until

STATUS = Keys().status("0")

SLOWLY = "[[demo first=0s pace=15ms]]"
"""An answer of a second or two: it is running when the data is lost and while the node recreates the stream."""


def flush_all(play: Stage) -> None:
    """FLUSHALL."""
    play.redis.flushall()


def delete_the_stream(play: Stage) -> None:
    """DEL."""
    play.redis.delete(REQUESTS)


def restart_without_data(play: Stage) -> None:
    """A Redis without persistence is killed and started."""
    assert isinstance(play.server, RedisServer)
    play.server.kill()
    play.server.start()


@pytest.mark.parametrize("lose", [flush_all, delete_the_stream, restart_without_data])
async def test_a_node_goes_on_when_redis_has_lost_its_requests_and_says_so_in_an_error(
    demo: DemoBackend, tmp_path: Path, lose: Callable[[Stage], None]
) -> None:
    with fresh_redis(tmp_path, "--appendonly", "no") as server:
        async with stage(server, demo, tmp_path) as play:
            running = [await play.user(10001), await play.user(10002)]
            for user in running:
                assert await user.ask("running", f"who is running? {SLOWLY}") == Event.ACCEPTED
                await user.grown("running", 20)
            lose(play)
            await wait_until(lambda: any("gone" in event for event in play.node.logged("error")), "an alarm")
            assert [group["name"] for group in play.redis.xinfo_groups(REQUESTS)] == [GROUP]
            # Running answers end whole for their clients: the node has the full text.
            for user in running:
                assert await user.ended("running") == "done"
                assert user.text("running") == expected(user.asked["running"])
            new = await play.user(10003)
            assert await new.ask("new", f"does it go on? {AT_ONCE}") == Event.ACCEPTED
            assert await new.ended("new") == "done"
            assert play.ai_calls() == 3


async def test_data_from_an_older_copy_is_logged_with_its_age(demo: DemoBackend, tmp_path: Path) -> None:
    with fresh_redis(tmp_path) as server:
        async with stage(server, demo, tmp_path, lease="1s") as play:
            user = await play.user()
            assert await user.ask("m", f"who is running? {SLOWLY}") == Event.ACCEPTED
            await user.grown("m", 20)
            data = server.folder / "appendonlydir"
            shutil.copytree(data, tmp_path / "copy")
            assert await user.ended("m") == "done"
            await wait_until(lambda: play.unfinished() == 0, "it is removed from the stream")
            then = int(play.redis.hget(STATUS, "renewed") or 0)
            await wait_until(lambda: int(play.redis.hget(STATUS, "renewed") or 0) > then + 600, "two more renewals")
            assert not play.node.logged("error")
            server.kill()
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "copy", data)
            server.start()
            told = "redis has come back with older data"
            await wait_until(lambda: told in play.node.logged("error"), "it is told")
            [line] = [json.loads(one) for one in play.node.process.log.read_text("utf-8").splitlines() if told in one]
            assert line["older_by_seconds"] > 0.6
            await wait_until(lambda: play.ai_calls() == 2, "the message is asked again")


async def test_a_waiting_message_that_redis_has_lost_is_expired_when_resumed_and_answered_when_sent_again(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with fresh_redis(tmp_path) as server:
        async with stage(server, demo, tmp_path, concurrency=1) as play:
            running, waiting = await play.user(10001), await play.user(10002)
            assert await running.ask("m1", f"who is running? {SLOWLY}") == Event.ACCEPTED
            await running.grown("m1")
            assert await waiting.ask("m2", f"who is waiting? {AT_ONCE}") == Event.ACCEPTED
            flush_all(play)
            play.users.remove(waiting)  # the accepted message is lost
            again = await play.user(10002, resume=[{"messageId": "m2"}])
            await again.until(lambda: again.is_expired("m2"), "m2 is EXPIRED")
            assert await again.ask("m2", f"who is waiting? {AT_ONCE}") == Event.ACCEPTED
            assert await again.ended("m2") == "done"
