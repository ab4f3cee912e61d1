"""Leases: each node has at most one holder, which notices when it loses the lease (I7)."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from imstream.errors import NodeTaken, StoreUnavailable
from imstream.store.leases import Held, HeldByOther, Holder, Leases
from imstream.worker.lease_keeper import LeaseKeeper, is_alive, this_process
from tests.redis.conftest import Store
from tests.support.waiting import wait_until

ONE = Holder("one", "host", "machine", 1, "http://one")
TWO = Holder("two", "host", "machine", 2, "http://two")


class Failing(Leases):
    """Leases whose Redis is unavailable on demand of the test."""

    away = False
    asked = 0

    async def acquire(self, holder: Holder, *, dead: str = "") -> Held | HeldByOther:
        """See `Leases`."""
        self.asked += 1
        if self.away:
            raise StoreUnavailable("away")
        return await super().acquire(holder, dead=dead)


def leases(store: Store, node: str = "0", **settings: Any) -> Failing:  # noqa: ANN401 - any setting
    """The leases of one node."""
    return Failing(store.redis_client, store.settings.model_copy(update={"node": node, **settings}))


async def test_one_holds_it_and_the_other_is_told_who(store: Store) -> None:
    own = leases(store)
    assert await own.acquire(ONE) == await own.acquire(ONE) == Held()
    refused = await own.acquire(TWO)
    assert isinstance(refused, HeldByOther)
    assert refused.holder == ONE
    assert timedelta(seconds=5) < refused.remaining <= timedelta(seconds=10)
    assert isinstance(await own.acquire(TWO, dead="somebody else"), HeldByOther)
    assert await own.acquire(TWO, dead=ONE.instance) == Held()
    assert isinstance(await own.acquire(ONE), HeldByOther)


async def test_a_note_of_another_type_about_the_run_of_redis_is_replaced(store: Store) -> None:
    own = leases(store)
    key = store.keys.redis_run("0")
    store.redis.hset(key, "by", "hand")
    assert not await own.redis_restarted_since("0")
    assert await own.acquire(ONE) == Held()
    assert store.redis.type(key) == "string"


async def test_only_the_holder_gives_it_up(store: Store) -> None:
    own = leases(store)
    await own.acquire(ONE)
    await own.release(TWO)
    assert isinstance(await own.acquire(TWO), HeldByOther)
    await own.release(ONE)
    assert await own.acquire(TWO) == Held()


async def test_others_see_how_long_it_lasts_and_who_was_ever_there(store: Store) -> None:
    own, other = leases(store), leases(store, "1")
    await own.acquire(ONE)
    await own.heartbeat()
    await other.heartbeat()
    assert set(await other.other_nodes()) == {"0"}
    assert set(await own.other_nodes()) == {"1"}
    left = await other.time_left(["0", "1"])
    assert left["1"] is None
    assert left["0"] is not None
    assert timedelta(seconds=5) < left["0"] <= timedelta(seconds=10)


async def test_what_was_written_by_hand_counts_as_a_holder_of_whom_nothing_is_known(store: Store) -> None:
    own = leases(store)
    for text in ("me", "{}", '{"pid": 1}', "[]", "null"):
        store.redis.set(store.keys.lease("0"), text, ex=60)
        refused = await own.acquire(ONE)
        assert isinstance(refused, HeldByOther)
        assert is_alive(refused.holder, ONE.machine) is None
    store.redis.persist(store.keys.lease("0"))
    assert (await own.time_left(["0"]))["0"] == timedelta.max, "without expiry, the node counts as alive"
    store.redis.delete(store.keys.lease("0"))


async def test_leases_that_make_no_sense_are_leases_all_the_same(store: Store) -> None:
    own, key = leases(store), store.keys.lease("1")
    store.redis.set(key, "far ahead", px=2**62)
    assert (await own.time_left(["1"]))["1"] == timedelta.max
    store.redis.set(store.keys.lease("0"), "far ahead", px=2**62)
    refused = await own.acquire(ONE)
    assert isinstance(refused, HeldByOther)
    assert refused.remaining == timedelta.max
    store.redis.delete(key, store.keys.lease("0"))


async def test_invalid_ids_are_no_nodes_and_a_node_without_a_heartbeat_is_not_recent(store: Store) -> None:
    own = leases(store)
    scores = {"eu-1": float("-inf"), "eu-2": float("inf"), "eu-3": 1e300, "eu-4": -1e300, "eu-5": 0}
    nobody = ("", "a b", "x" * 65, "}{node:0}", "1\n", "\x9b31m", b"\xff", "节点")
    store.redis.zadd(store.keys.nodes(), {**scores, **dict.fromkeys(nobody, 1.0)})
    others = await own.other_nodes()
    assert set(others) == set(scores)
    assert all(since > timedelta(days=365) for since in others.values())
    store.redis.delete(store.keys.nodes())


def lease_of(store: Store, **fields: object) -> str:
    """Write a lease with any fields; by default, that of a dead process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    store.redis.set(
        store.keys.lease("0"), text := json.dumps({**asdict(this_process("")), "pid": process.pid} | fields)
    )
    return text


async def test_a_tenure_waits_for_the_end_of_a_lease_that_it_cannot_read(store: Store) -> None:
    own = leases(store)
    lease_of(store, pid="1")
    wrong: list[object] = [{}, 10**30, 1.5, None]
    async with running(keeper := keeper_of(store, own)) as task:
        for pid in wrong:
            await wait_until(partial(lambda asked: own.asked > asked, own.asked), "it asks for it")
            assert not task.done()
            lease_of(store, pid=pid)
        store.redis.delete(store.keys.lease("0"))
        await wait_until(lambda: keeper.held, "it is held")


async def test_a_late_renewal_of_a_dead_process_does_not_keep_the_next_one_from_starting(store: Store) -> None:
    own, before = leases(store), leases(store)
    await before.acquire(ONE)
    async with running(keeper := keeper_of(store, own)) as task:
        await wait_until(lambda: own.asked > 1, "it waits for the lease")
        await before.acquire(ONE)  # it was given up when the process was killed
        asked = own.asked
        await wait_until(lambda: own.asked > asked + 1 or task.done(), "it asks again")
        assert not task.done()
        store.redis.delete(store.keys.lease("0"))
        await wait_until(lambda: keeper.held, "it is held")


async def test_a_lease_keeper_pauses_between_tries_to_replace_a_holder_that_redis_does_not_recognise(
    store: Store,
) -> None:
    text = lease_of(store, instance="quetzal")
    store.redis.set(store.keys.lease("0"), text.replace('"quetzal"', '"\\u0071uetzal"'))
    own = leases(store)
    async with running(keeper := keeper_of(store, own)) as task:
        await wait_until(lambda: own.asked > 1, "it has asked for it")
        asked, began = own.asked, time.monotonic()
        await wait_until(lambda: own.asked > asked + 1, "it asks again")
        assert time.monotonic() - began > 0.1, "but not without a pause"
        assert not task.done()
        store.redis.delete(store.keys.lease("0"))
        await wait_until(lambda: keeper.held, "it is held")


def test_whether_a_process_of_this_machine_lives_is_known_at_once() -> None:
    us = this_process("http://us")
    assert us.machine
    assert is_alive(replace(us, pid=os.getppid()), us.machine) is True
    assert is_alive(us, us.machine) is False, "another process had our process id"
    assert is_alive(replace(us, pid=os.getppid(), machine="elsewhere"), us.machine) is None
    assert is_alive(replace(us, pid=os.getppid(), machine=""), "") is None
    for pid in (0, -1):
        assert is_alive(replace(us, pid=pid), us.machine) is None
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        child = replace(us, pid=process.pid)
        assert is_alive(child, us.machine) is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but its exit code was not read
        assert is_alive(child, us.machine) is False
    finally:
        process.communicate()
    assert is_alive(child, us.machine) is False


@asynccontextmanager
async def running(keeper: LeaseKeeper) -> AsyncIterator[asyncio.Task[None]]:
    """Run the lease keeper until the end of the block."""
    task = asyncio.create_task(keeper.run("http://here"))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def keeper_of(store: Store, own: Leases, **settings: Any) -> LeaseKeeper:  # noqa: ANN401 - any setting
    quick = {"lease": timedelta(milliseconds=1200), "redis_timeout": timedelta(milliseconds=300), **settings}
    return LeaseKeeper(own, store.settings.model_copy(update=quick))


async def test_a_lease_that_cannot_be_renewed_is_not_relied_on_to_its_end_and_is_held_again_later(
    store: Store,
) -> None:
    lease = timedelta(milliseconds=2400)  # it is not relied on in its last quarter
    own = leases(store, lease=lease)
    keeper = keeper_of(store, own, lease=lease)
    assert not keeper.held
    async with running(keeper):
        await wait_until(lambda: keeper.held, "it is held")
        assert keeper.can_declare_dead
        own.away = True
        await wait_until(lambda: not keeper.held, "it is no longer relied on")
        assert store.redis.exists(store.keys.lease("0")), "before it ends"
        await wait_until(lambda: not store.redis.exists(store.keys.lease("0")), "it ends")
        own.away = False
        await wait_until(lambda: keeper.held, "it is held again")
        assert not keeper.can_declare_dead, "others may not have come back to Redis yet"
        await wait_until(lambda: keeper.can_declare_dead, "others have had time to reconnect")
        assert keeper.held


async def test_a_tenure_ends_when_another_process_has_the_lease(store: Store) -> None:
    own = leases(store, lease=timedelta(milliseconds=1200))
    keeper = keeper_of(store, own)
    async with running(keeper) as task:
        await wait_until(lambda: keeper.held, "it is held")
        store.redis.set(store.keys.lease("0"), ONE.encode(), ex=60)
        with pytest.raises(NodeTaken, match=r"node 0 is run by another process \(http://one, process 1 on host\)"):
            await task
        assert not keeper.held
        await keeper.release()
        assert store.redis.get(store.keys.lease("0")) == ONE.encode(), "another process holds it"


async def test_a_tenure_that_was_given_up_is_not_taken_again_by_a_renewal_on_its_way(store: Store) -> None:
    own = leases(store)
    keeper = keeper_of(store, own, lease=timedelta(milliseconds=3))
    async with running(keeper) as task:
        await wait_until(lambda: store.redis.exists(store.keys.lease("0")), "it is held")
        await keeper.release()
        await task
        assert not store.redis.exists(store.keys.lease("0"))
        assert not keeper.held
