"""A slot of a Redis Cluster moves, or a master dies: accepted messages are answered, other users are not affected."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from imstream.codes import Code, Event
from imstream.user_ids import UserId
from tests.support.chatter import Chatter
from tests.support.redis_sets import ClusterSet, cluster_set
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, KEYS, REQUESTS, stage
from tests.support.waiting import wait_until

REPLACED_WITHIN = 15.0
"""Time limit, in seconds, for promoting a replica and for the node to recover: two or three on an idle machine."""

SLOWLY = "[[demo first=0s pace=20ms length=200]]"
"""An answer that takes longer than replacing a master."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterSet]:
    """A cluster for one test."""
    with cluster_set(tmp_path / "cluster") as made:
        yield made


def replies_of(user_id: UserId) -> str:
    """Return a key in the slot of a user."""
    return KEYS.reply(user_id, "m")


def users_on(cluster: ClusterSet, server: RedisServer) -> Iterator[int]:
    """Return users whose replies are stored on this master."""
    return (user for user in range(10001, 10500) if cluster.master_of(replies_of(user)) is server)


@asynccontextmanager
async def asking(users: list[Chatter]) -> AsyncIterator[list[str]]:
    """Let each user ask one question after another, repeating refused ones; return the refusals so far."""
    over = asyncio.Event()
    refusals: list[str] = []

    async def ask(user: Chatter) -> None:
        number = 0
        while not over.is_set():
            number += 1
            refusals.extend(await user.ask_until_accepted(f"m{number}", f"question {number} {AT_ONCE}"))
            await user.ended(f"m{number}")

    async with asyncio.TaskGroup() as group:
        for user in users:
            group.create_task(ask(user))
        yield refusals
        over.set()


async def test_slots_move_while_people_chat_and_nothing_is_lost_or_answered_twice(
    demo: DemoBackend, tmp_path: Path, cluster: ClusterSet
) -> None:
    async with stage(cluster, demo, tmp_path, user_limit=100) as play:
        users = [await play.user(10001 + number) for number in range(5)]
        running = await play.user(10101)
        assert await running.ask("running", f"who is running? {SLOWLY}") == Event.ACCEPTED
        await running.grown("running")
        async with asking(users) as refusals:
            for key in (REQUESTS, replies_of(users[0].user_id), replies_of(running.user_id), REQUESTS):
                source = await asyncio.to_thread(cluster.master_of, key)
                target = cluster.other_than(source)
                before = len(users[0].asked)
                await asyncio.to_thread(cluster.move, key, target)
                await wait_until(lambda: len(users[0].asked) > before + 2, "they chat on")  # noqa: B023 - awaited here
        assert set(refusals) <= {Code.UNAVAILABLE}
        await play.curtain()
        assert play.ai_calls() == sum(len(user.asked) for user in play.users)
        assert [event for event in play.node.logged("error") if "gone" in event] == []


async def test_the_master_of_the_requests_dies_and_what_was_accepted_is_answered_after_it_was_replaced(
    demo: DemoBackend, tmp_path: Path, cluster: ClusterSet
) -> None:
    async with stage(cluster, demo, tmp_path, concurrency=4, user_limit=10) as play:
        users = [await play.user(10001 + number) for number in range(6)]
        asked = [user.ask(f"m{n}", f"before the death, {n}") for user in users for n in range(2)]
        assert set(await asyncio.gather(*asked)) == {Event.ACCEPTED}
        await users[0].grown("m0")
        master = cluster.master_of(REQUESTS)
        await _in_step(cluster, master)
        master.kill()
        await play.node.becomes(503, limit=REPLACED_WITHIN)
        assert await users[0].ask("dead", "while it is dead") == Code.UNAVAILABLE
        await play.node.becomes(200, limit=REPLACED_WITHIN)
        assert await users[0].ask("dead", "while it is dead") == Event.ACCEPTED
        await play.curtain()
        assert [event for event in play.node.logged("error") if "gone" in event] == []


async def test_the_master_of_some_users_dies_and_the_others_chat_on(
    demo: DemoBackend, tmp_path: Path, cluster: ClusterSet
) -> None:
    here = cluster.master_of(REQUESTS)
    there = cluster.other_than(here)
    async with stage(cluster, demo, tmp_path, user_limit=100) as play:
        safe = [await play.user(user) for user, _ in zip(users_on(cluster, here), range(3), strict=False)]
        hit = await play.user(next(users_on(cluster, there)))
        assert await hit.ask("m0", f"who is running? {SLOWLY}") == Event.ACCEPTED
        await hit.grown("m0")
        async with asking(safe) as refusals:
            replica = cluster.replicas[cluster.masters.index(there)]
            await _in_step(cluster, there)
            there.kill()
            before = len(safe[0].asked)
            await wait_until(lambda: len(safe[0].asked) > before + 20, "the others chat on")
            await wait_until(lambda: _is_master(replica), "its replica is a master", limit=REPLACED_WITHIN)
        assert refusals == []
        assert await play.node.status() == 200
        await play.curtain()


async def test_the_master_of_the_requests_is_full_and_who_is_refused_has_as_many_messages_left_as_before(
    demo: DemoBackend, tmp_path: Path, cluster: ClusterSet
) -> None:
    full = cluster.master_of(REQUESTS)
    there = cluster.other_than(full)
    async with stage(cluster, demo, tmp_path, daily_quota=1) as play:
        user = await play.user(next(users_on(cluster, there)))
        with full.client() as client:
            client.config_set("maxmemory", 1)
            assert await user.ask("m1", f"while it is full {AT_ONCE}") == Code.BUSY
            client.config_set("maxmemory", 0)
        assert await user.ask("m2", f"when it is not {AT_ONCE}") == Event.ACCEPTED
        await play.curtain()


async def _in_step(cluster: ClusterSet, master: RedisServer) -> None:
    replica = cluster.replicas[cluster.masters.index(master)]
    with master.client() as one, replica.client() as other:
        await wait_until(lambda: one.dbsize() == other.dbsize(), "the replica has what the master has")
        assert one.wait(1, 5000) == 1


def _is_master(server: RedisServer) -> bool:
    with server.client() as client:
        info = client.info("replication")
        assert isinstance(info, dict)
        return bool(info["role"] == "master")
