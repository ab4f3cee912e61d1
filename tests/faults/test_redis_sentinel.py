"""Sentinel replaces the master: only writes that had not reached the replica are lost, and the loss is announced."""

import asyncio
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from imstream.cli.main import main
from imstream.codes import Code, Event
from tests.support.redis_sets import SentinelSet, sentinel_set
from tests.support.servers import DemoBackend
from tests.support.stage import AT_ONCE, DEAD, KEYS, REQUESTS, expected, stage
from tests.support.waiting import wait_until

REPLACED_WITHIN = 15.0
"""Time limit, in seconds, for the Sentinels to agree and the node to recover: two or three on an idle machine."""

SLOWLY = "[[demo first=0s pace=20ms length=200]]"
"""An answer that takes longer than a failover."""


async def test_nothing_replicated_is_lost_when_the_master_is_killed(demo: DemoBackend, tmp_path: Path) -> None:
    with sentinel_set(tmp_path) as sentinels:
        async with stage(sentinels, demo, tmp_path, concurrency=4, user_limit=10) as play:
            users = [await play.user(10001 + number) for number in range(6)]
            asked = [user.ask(f"m{n}", f"before the death, {n}") for user in users for n in range(2)]
            assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
            play.redis.xadd(DEAD, {"user": "10001", "message_id": "letter", "contents": AT_ONCE, "attempts": "1"})
            await _in_step(sentinels)
            sentinels.master.kill()
            await play.node.becomes(503, limit=REPLACED_WITHIN)
            assert await users[0].ask("dead", "while it is dead") == Code.UNAVAILABLE
            await play.node.becomes(200, limit=REPLACED_WITHIN)
            assert await users[0].ask("dead", "while it is dead") == Event.ACCEPTED
            retry = ["dead", "retry", "--node", "0", "--redis", sentinels.url]
            retried = await asyncio.to_thread(CliRunner().invoke, main, retry)
            assert "message letter  is a request again" in retried.output
            await play.curtain()
            rows: Any = play.redis.xrange(KEYS.reply(10001, "letter"))
            events = [fields["event"] for _, fields in rows]
            assert [event for event in events if event not in {"queued", "text"}] == ["opened", "done"]
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

            # From here on, no write reaches the replica, and the master does not notice.
            assert await finished.ended("finished") == "done"
            assert await lost.ask("lost", f"who was too late? {AT_ONCE}") == Event.ACCEPTED
            sentinels.master.kill()
            await play.node.becomes(503, limit=REPLACED_WITHIN)
            await play.node.becomes(200, limit=REPLACED_WITHIN)

            # Request and reply are lost. A client that resumes gets EXPIRED; one that resends is answered.
            play.users.remove(lost)
            again = await play.user(lost.user_id, resume=[{"messageId": "lost"}])
            # On a slow machine the node may have begun the answer before the fail-over: then it is recorded again.
            await again.until(lambda: again.is_expired("lost") or bool(again.ends("lost")), "the lost message is known")
            if again.is_expired("lost"):
                assert await again.ask("lost", f"who was too late? {AT_ONCE}") == Event.ACCEPTED
                assert await again.ended("lost") == "done"
            assert again.text("lost") == expected(f"who was too late? {AT_ONCE}")
            for user in (running, kept, finished):
                [message_id] = user.asked
                assert await user.ended(message_id) == "done"
                assert user.text(message_id) == expected(user.asked[message_id])
            # Its record was lost, so it is answered and recorded a second time; its client has seen the end already.
            await wait_until(lambda: play.unfinished() == 0, "all is recorded")
            await finished.ask("after", f"is that all? {AT_ONCE}")
            assert await finished.ended("after") == "done"
            assert finished.ends("finished") == ["done"]


async def _in_step(sentinels: SentinelSet) -> None:
    """Wait until the replica has caught up with the master."""
    with sentinels.master.client() as master, sentinels.replica.client() as replica:
        await wait_until(
            lambda: (
                master.xinfo_stream(REQUESTS)["last-generated-id"]
                == replica.xinfo_stream(REQUESTS)["last-generated-id"]
            ),
            "the replica has the requests",
        )


def _cut_off_replica(sentinels: SentinelSet) -> None:
    """Disconnect the replica from the master for good."""
    with sentinels.master.client() as master:
        master.execute_command("ACL SETUSER", "replica", "-psync")
        master.execute_command("CLIENT KILL", "TYPE", "replica")
