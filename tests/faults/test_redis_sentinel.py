"""Sentinel replaces the master, and what had not reached the replica is lost: it is said, and nothing else is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

from imstream.wire import Code, Event
from tests.support.redis_sets import SentinelSet, sentinel_set
from tests.support.servers import DemoBackend
from tests.support.stage import AT_ONCE, REQUESTS, expected, stage
from tests.support.waiting import wait_until

REPLACED_WITHIN = 15.0
"""Seconds in which the Sentinels have agreed and the node is back: two or three, on an idle machine."""

SLOWLY = "[[demo first=0s pace=20ms length=200]]"
"""Takes longer than a fail-over."""


async def test_nothing_replicated_is_lost_when_the_master_is_killed(demo: DemoBackend, tmp_path: Path) -> None:
    with sentinel_set(tmp_path) as sentinels:
        async with stage(sentinels, demo, tmp_path, concurrency=4, user_limit=10) as play:
            users = [await play.user(10001 + number) for number in range(6)]
            asked = [user.ask(f"m{n}", f"before the death, {n}") for user in users for n in range(2)]
            assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
            await _in_step(sentinels)
            sentinels.master.kill()
            await play.node.becomes(503, limit=REPLACED_WITHIN)
            assert await users[0].ask("dead", "while it is dead") == Code.UNAVAILABLE
            await play.node.becomes(200, limit=REPLACED_WITHIN)
            assert await users[0].ask("dead", "while it is dead") == Event.ACCEPTED
            await play.curtain()
            assert [event for event in play.node.logged("error") if "gone" in event] == []


async def test_what_a_fail_over_loses_is_expired_for_its_client_who_sends_it_again_and_the_rest_is_answered_once(
    demo: DemoBackend, tmp_path: Path
) -> None:
    with sentinel_set(tmp_path) as sentinels:
        async with stage(sentinels, demo, tmp_path, concurrency=2, user_limit=10) as play:
            running, kept, finished, lost = [await play.user(10001 + number) for number in range(4)]
            assert await running.ask("running", f"who is running? {SLOWLY}") == Event.ACCEPTED
            await running.grown("running")
            assert await finished.ask("finished", f"who is early? {SLOWLY.replace('200', '60')}") == Event.ACCEPTED
            await finished.grown("finished")
            assert await kept.ask("kept", f"who was in time? {SLOWLY}") == Event.ACCEPTED
            await _in_step(sentinels)
            _cut_off_replica(sentinels)

            # From here on, nothing reaches the replica, and the master does not know.
            assert await finished.ended("finished") == "done"
            assert await lost.ask("lost", f"who was too late? {AT_ONCE}") == Event.ACCEPTED
            sentinels.master.kill()
            await play.node.becomes(503, limit=REPLACED_WITHIN)
            await play.node.becomes(200, limit=REPLACED_WITHIN)

            # The request is lost, and so is the reply. Who asks is told; who sends it again is answered.
            play.users.remove(lost)
            again = await play.user(lost.user_id, resume=[{"messageId": "lost"}])
            await again.until(lambda: again.is_expired("lost"), "the lost message is EXPIRED")
            assert await again.ask("lost", f"who was too late? {AT_ONCE}") == Event.ACCEPTED
            for user in (running, kept, finished, again):
                [message_id] = user.asked
                assert await user.ended(message_id) == "done"
                assert user.text(message_id) == expected(user.asked[message_id])
            # Its record was lost, so it is answered a second time, for the record: its client has seen the end already.
            await wait_until(lambda: play.unfinished() == 0, "all is recorded")
            await finished.ask("after", f"is that all? {AT_ONCE}")
            assert await finished.ended("after") == "done"
            assert finished.ends("finished") == ["done"]


async def _in_step(sentinels: SentinelSet) -> None:
    """Wait until the replica has what the master has."""
    with sentinels.master.client() as master, sentinels.replica.client() as replica:
        await wait_until(
            lambda: (
                master.xinfo_stream(REQUESTS)["last-generated-id"]
                == replica.xinfo_stream(REQUESTS)["last-generated-id"]
            ),
            "the replica has the requests",
        )


def _cut_off_replica(sentinels: SentinelSet) -> None:
    """The master goes on without its replica, which may not come back."""
    with sentinels.master.client() as master:
        master.execute_command("ACL SETUSER", "replica", "-psync")
        master.execute_command("CLIENT KILL", "TYPE", "replica")
