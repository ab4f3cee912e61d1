"""Exactly one node adopts the stream of a dead node; requests are never taken from living nodes (I1, I7)."""

import pytest

from imstream.store.requests import Entry, PendingEntry, RequestStream
from tests.redis.worker_harness import USER, PlayedBackend, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

QUICK_LEASE = "1s"


def directory(worker: WorkerHarness) -> list[str]:
    """The nodes in the directory."""
    return sorted(worker.redis.zrange(worker.keys.nodes(), 0, -1))


async def no_longer_adopted(worker: WorkerHarness) -> None:
    """Wait until the adopter of node 0 has noticed that it is back, and reads no further requests."""
    await wait_until(lambda: not worker.redis.exists(worker.keys.adopter("0")), "it is no longer adopted")


async def test_an_entry_is_adopted_when_its_node_dies(redis_server: RedisServer) -> None:
    async with (
        run_worker(redis_server, lease=QUICK_LEASE) as dying,
        run_worker(redis_server, node="1", lease=QUICK_LEASE, start=False) as other,
    ):
        await dying.ask("begun")
        (await dying.backend.call(1)).send("half of ")
        await wait_until(lambda: dying.recorded_text("begun") == "half of ", "half of it is recorded")
        dying.consumer.stop()  # the next request stays undelivered
        await dying.no_longer_reads()  # and no other node reads it yet
        other.start()
        await dying.ask("waiting")
        await dying.crash()
        await other.backend.call(2)
        for call in other.backend.calls:
            call.done("all of it")
        await other.idle()
        assert other.recorded("begun") == other.recorded("waiting") == ("done", "all of it")
        assert other.attempts("begun") == [1, 2]
        assert other.begun == ["waiting"]


async def test_requests_of_a_dead_node_are_claimed_many_at_a_time(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round trip for each of thousands of requests, one after the other, kept their users waiting for a minute."""
    claim, under_way, maximum = RequestStream.claim, 0, 0

    async def counted(self: RequestStream, entry: PendingEntry, *, deliveries: int) -> Entry | None:
        nonlocal under_way, maximum
        under_way += 1
        maximum = max(maximum, under_way)
        try:
            return await claim(self, entry, deliveries=deliveries)
        finally:
            under_way -= 1

    monkeypatch.setattr(RequestStream, "claim", counted)
    async with (
        run_worker(redis_server, lease=QUICK_LEASE) as dying,
        run_worker(redis_server, node="1", lease=QUICK_LEASE) as other,
    ):
        names = [f"m{number}" for number in range(10)]
        for name in names:
            await dying.ask(name)
        await dying.backend.call(len(names))
        await dying.crash()
        for number in range(1, len(names) + 1):
            (await other.backend.call(number)).done("x")
        await other.idle()
        assert {other.recorded(name) for name in names} == {("done", "x")}
    assert maximum == len(names)


async def test_when_all_is_done_the_adopter_leaves_no_trace_in_the_group(redis_server: RedisServer) -> None:
    async with (
        run_worker(redis_server, lease=QUICK_LEASE) as dying,
        run_worker(redis_server, node="1", lease=QUICK_LEASE) as other,
    ):
        other.backend.always = lambda call: call.done("x")
        await dying.ask()
        await dying.backend.call(1)
        await dying.crash()
        await other.idle()
        await no_longer_adopted(other)
        assert other.consumers() == ["0"]
        await wait_until(lambda: other.adopter.adopted == [], "nothing is adopted")


async def test_one_of_many_adopts(redis_server: RedisServer) -> None:
    backend = PlayedBackend()
    async with (
        run_worker(redis_server, lease=QUICK_LEASE) as dying,
        run_worker(redis_server, node="1", lease=QUICK_LEASE, backend=backend) as one,
        run_worker(redis_server, node="2", lease=QUICK_LEASE, backend=backend) as two,
    ):
        await dying.ask()
        await dying.backend.call(1)
        await dying.crash()
        call = await backend.call(1)
        adopters = [worker for worker in (one, two) if worker.adopter.adopted == ["0"]]
        assert len(adopters) == 1
        assert dying.redis.get(dying.keys.adopter("0")) == adopters[0].settings.node
        call.done("x")
        await one.idle()
        assert len(backend.calls) == 1


async def test_a_long_answer_is_never_stolen_from_a_living_node(redis_server: RedisServer) -> None:
    async with (
        run_worker(redis_server, lease="300ms") as working,
        run_worker(redis_server, node="1", lease="300ms") as other,
    ):
        await working.ask()
        call = await working.backend.call(1)

        def looks() -> int:
            return int(other.redis.info("commandstats").get("cmdstat_pttl", {"calls": 0})["calls"])

        looked = looks()
        await wait_until(lambda: looks() > looked + 20, "the other scans often")
        call.done("x")
        await working.idle()
        assert working.recorded() == ("done", "x")
        assert other.backend.calls == []


async def test_a_node_that_is_back_takes_what_comes_and_the_adopter_finishes_what_it_has(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, node="1", lease=QUICK_LEASE) as other:
        async with run_worker(redis_server, lease=QUICK_LEASE) as dying:
            await dying.ask("old")
            await dying.backend.call(1)
            await dying.crash()
        old = await other.backend.call(1)
        async with run_worker(redis_server, lease=QUICK_LEASE) as back:
            await no_longer_adopted(back)
            await back.ask("new")
            (await back.backend.call(1)).done("by the node itself")
            await wait_until(lambda: back.entries("new")[-1]["event"] == "done", "the new one is answered")
            old.done("by the adopter")
            await back.idle()
            assert back.recorded("new") == ("done", "by the node itself")
            assert back.recorded("old") == ("done", "by the adopter")
            await wait_until(lambda: other.adopter.adopted == [], "the stream is released")
        assert len(other.backend.calls) == 1


async def test_what_a_node_hands_back_when_it_drains_is_adopted_and_does_not_count_as_a_death(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, node="1", lease="1s", max_deliveries=1) as other:
        async with run_worker(redis_server, lease="1s", max_deliveries=1) as leaving:
            await leaving.ask()
            await leaving.backend.call(1)
        (await other.backend.call(1)).done("x")
        await other.idle()
        assert other.recorded() == ("done", "x")


async def test_a_request_that_kills_every_node_is_buried(redis_server: RedisServer) -> None:
    for node in ("0", "1"):
        async with run_worker(redis_server, node=node, lease="200ms", max_deliveries=2) as dying:
            if node == "0":
                await dying.ask()
            await dying.backend.call(1)
            await dying.crash()
    async with run_worker(redis_server, node="2", lease="200ms", max_deliveries=2) as last:
        await last.idle()
        assert last.recorded()[0] == "failed"
        assert [letter["reason"] for letter in last.dead()] == ["worker_died"]
        assert last.backend.calls == []


async def test_an_adopter_that_dies_is_followed_by_another(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, lease=QUICK_LEASE) as first:
        await first.ask()
        await first.backend.call(1)
        await first.crash()
    async with run_worker(redis_server, node="1", lease=QUICK_LEASE) as second:
        await second.backend.call(1)
        await second.crash()
    async with run_worker(redis_server, node="2", lease=QUICK_LEASE) as third:
        (await third.backend.call(1)).done("x")
        await third.idle()
        assert third.recorded() == ("done", "x")
        await wait_until(lambda: third.consumers() == ["0"], "both adopters have left the group")


async def test_a_node_that_is_gone_for_good_is_forgotten(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, lease="200ms") as leaving:
        await leaving.ask()
        (await leaving.backend.call(1)).done("x")
        await leaving.idle()
    async with run_worker(redis_server, node="1", lease="200ms", retire_after="300ms") as other:
        await wait_until(lambda: directory(other) == ["1"], "it has left the directory")
        assert not other.redis.exists(*(key(node="0") for key in (other.keys.requests, other.keys.load)))


async def test_dead_letters_that_an_older_release_has_buried_without_an_expiry_get_one(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, lease="200ms") as leaving:
        await wait_until(lambda: directory(leaving) == ["0"], "it is in the directory")
        dead = leaving.keys.dead("0")
        leaving.redis.xadd(dead, {"user": "1", "message_id": "m", "reason": "x"})
    async with run_worker(redis_server, node="1", lease="200ms", retire_after="300ms") as other:
        await wait_until(lambda: directory(other) == ["1"], "it has left the directory")
        assert other.redis.pttl(dead) > 0


async def test_a_dead_node_with_requests_is_not_forgotten(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, lease="200ms") as dying:
        await dying.ask()
        await dying.backend.call(1)
        await dying.crash()
    async with run_worker(redis_server, node="1", lease="200ms", retire_after="1ms") as other:
        call = await other.backend.call(1)
        assert directory(other) == ["0", "1"]
        call.done("x")
        await wait_until(lambda: directory(other) == ["1"], "it has left the directory when all is done")
        assert other.recorded() == ("done", "x")


async def test_home_and_adopted_streams_share_the_slots(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, lease=QUICK_LEASE) as dying:
        await wait_until(lambda: directory(dying) == ["0"], "it is in the directory")
        dying.consumer.stop()
        for n in range(6):
            await dying.ask(f"theirs-{n}")
        await dying.crash()
    async with run_worker(redis_server, node="1", lease=QUICK_LEASE, concurrency=4) as other:
        for n in range(6):
            await other.ask(f"ours-{n}", user=USER + 1)
        answered = 0
        while answered < 12:
            call = await other.backend.call(answered + 1)
            assert len(other.jobs) <= 4
            call.done("x")
            answered += 1
        await wait_until(lambda: len(other.jobs) == 0, "all are done")
        assert [other.recorded(f"theirs-{n}") for n in range(6)] == [("done", "x")] * 6


async def test_a_node_that_dies_again_is_adopted_again_by_who_still_works_on_what_it_left_the_first_time(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, node="1", lease=QUICK_LEASE) as other:
        async with run_worker(redis_server, lease=QUICK_LEASE) as dying:
            await dying.ask("first")
            await dying.backend.call(1)
            await dying.crash()
        first = await other.backend.call(1)
        async with run_worker(redis_server, lease=QUICK_LEASE) as back:
            await no_longer_adopted(back)
            await back.ask("second")
            await back.backend.call(1)
            await back.crash()
        (await other.backend.call(2)).done("the second")
        await wait_until(lambda: other.entries("second")[-1]["event"] == "done", "the second is answered")
        first.done("the first")
        await other.idle()
        assert other.recorded("first") == ("done", "the first")
        await wait_until(lambda: other.adopter.adopted == [], "the stream is released")


async def test_an_adopted_stream_gets_the_only_slot_of_a_node_that_has_nothing_else_to_do(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, lease=QUICK_LEASE) as dying:
        await dying.ask("begun")
        await dying.backend.call(1)
        dying.consumer.stop()
        await dying.no_longer_reads()
        await dying.ask("waiting")
        await dying.crash()
    # With such a long blocked read of its own stream, the slot is rarely free.
    async with run_worker(redis_server, node="1", lease=QUICK_LEASE, concurrency=1, read_block="1s") as other:
        (await other.backend.call(1)).done("x")
        (await other.backend.call(2)).done("x")
        await other.idle()
        assert other.recorded("begun") == other.recorded("waiting") == ("done", "x")
