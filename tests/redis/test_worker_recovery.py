"""Requests left pending by another process or by an accident are recovered."""

from __future__ import annotations

import asyncio

import pytest

from imstream.keys import GROUP
from imstream.model import Terminal
from imstream.store.requests import Entry
from imstream.store.scripts import LUA
from tests.redis.conftest import chat_request
from tests.redis.workshop import USER, Call, PlayedBackend, Workshop, workshop
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until


def leave_pending(shop: Workshop, deliveries: int, *entry_ids: str) -> None:
    """Make the entries pending as if a process had died with each of them `deliveries` times."""
    stream = shop.keys.requests("0")
    shop.redis.xreadgroup(GROUP, "0", {stream: ">"}, count=len(entry_ids))
    for entry_id in entry_ids:
        shop.redis.execute_command("XCLAIM", stream, GROUP, "0", 0, entry_id, "RETRYCOUNT", deliveries)


async def test_a_request_whose_worker_died_in_the_middle_is_answered_by_the_next_process(
    redis_server: RedisServer,
) -> None:
    async with workshop(redis_server) as shop:
        await shop.ask()
        client = shop.follow()
        call = await shop.backend.call(1)
        call.send("half of ")
        await wait_until(lambda: len(shop.entries()) == 3, "half of it is recorded")
        call.send("an answer")  # shown to the client, not recorded
        await shop.crash()
        assert call.cancelled
    async with workshop(redis_server) as shop:
        record = await shop.replies.read(USER, "m")
        assert record is not None
        reply = shop.buffers.get(USER, "m")
        reply.load(record)
        # The client resumes with more text than was recorded.
        client = shop.follow(attempt=1, offset=len(client.text), text=client.text)
        (await shop.backend.call(1)).done("the whole answer")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("the whole answer", 1)
        await shop.idle()
        assert shop.recorded() == ("done", "the whole answer")
        assert shop.entries()[-1]["attempt"] == "2"


@pytest.mark.parametrize("died_before", ["the end", "the acknowledgement", "the burial"])
async def test_a_request_is_ended_once_wherever_its_worker_died(redis_server: RedisServer, died_before: str) -> None:
    async with workshop(redis_server, start=False) as shop:
        await shop.requests.ensure_group()
        entry_id = await shop.ask()
        leave_pending(shop, 1, entry_id)
        await shop.replies.open(USER, "m", request=f"0/{entry_id}")
        script = {"attempt": 1, "before": 0, "after": 4, "text": "text"}
        if died_before == "the acknowledgement":
            await shop.replies.append(USER, "m", **script, terminal=Terminal("done", "stop"))  # type: ignore[arg-type]
        elif died_before == "the burial":
            failed = Terminal("failed", reason="http_400", error="no such model")
            await shop.replies.append(USER, "m", **script, terminal=failed)  # type: ignore[arg-type]
        else:
            await shop.replies.append(USER, "m", **script)  # type: ignore[arg-type]
        shop.backend.always = lambda call: call.done("anew")
        shop.start()
        await shop.idle()
        if died_before == "the end":
            assert shop.recorded() == ("done", "anew")
            assert shop.dead() == []
        elif died_before == "the acknowledgement":
            assert shop.recorded() == ("done", "text")
            assert shop.dead() == []
        else:
            assert shop.recorded() == ("failed", "text")
            assert [letter["reason"] for letter in shop.dead()] == ["http_400"]
        assert len(shop.backend.calls) == (died_before == "the end")


async def test_a_request_that_was_read_but_never_heard_of_is_taken_up(redis_server: RedisServer) -> None:
    async with workshop(redis_server, sweep_interval="50ms") as shop:
        await wait_until(lambda: shop.consumer.reached_redis_within(1), "it is running")
        # Read under the node's name, as if Redis' reply had been lost.
        with shop.redis.pipeline() as both:
            both.xadd(shop.keys.requests("0"), _fields("lost"))
            both.xreadgroup(GROUP, "0", {shop.keys.requests("0"): ">"})
            both.execute()
        (await shop.backend.call(1)).done("x")
        await shop.idle()
        assert shop.recorded("lost") == ("done", "x")


def _fields(message_id: str) -> dict[str, str]:
    flat = chat_request(USER, message_id).fields()
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def test_a_request_that_killed_its_worker_too_often_is_buried_and_the_client_told(
    redis_server: RedisServer,
) -> None:
    for death in range(3):
        async with workshop(redis_server, max_deliveries=3) as shop:
            if death == 0:
                await shop.ask()
            await shop.backend.call(1)
            assert list(shop.pending().values()) == [death + 1]
            await shop.crash()
    async with workshop(redis_server, max_deliveries=3) as shop:
        await shop.idle()
        assert shop.recorded() == ("failed", "")
        [letter] = shop.dead()
        assert letter["reason"] == "worker_died"
        assert letter["error"] == "its worker died 3 times while working on it"
        assert shop.backend.calls == []


async def test_a_request_that_was_handed_back_in_good_order_has_not_died(redis_server: RedisServer) -> None:
    for _ in range(5):
        async with workshop(redis_server, max_deliveries=2) as shop:
            if not shop.pending():
                await shop.ask()
            await shop.backend.call(1)
            await shop.stop()
            assert shop.backend.calls[0].cancelled
            assert list(shop.pending().values()) == [0]
    async with workshop(redis_server, max_deliveries=2) as shop:
        (await shop.backend.call(1)).done("at last")
        await shop.idle()
        assert shop.recorded() == ("done", "at last")


async def test_suspects_run_one_at_a_time_and_beside_requests_that_are_none(redis_server: RedisServer) -> None:
    async with workshop(redis_server, start=False, max_deliveries=9) as shop:
        await shop.requests.ensure_group()
        suspects = [await shop.ask(f"suspect {n}") for n in range(3)]
        leave_pending(shop, 2, *suspects)
        await shop.ask("harmless")
        shop.start()
        await shop.backend.call(2)
        await wait_until(lambda: len(shop.pending()) == 4, "everything is delivered")
        for answered in range(3):
            await wait_until(lambda n=answered: len(shop.backend.calls) == n + 2, "one more suspect runs")
            assert len(shop.jobs) == 2
            next(call for call in shop.backend.calls if _open(call) and "suspect" in _asked(shop, call)).done("x")
        next(call for call in shop.backend.calls if _open(call)).done("x")
        await shop.idle()


def _open(call: Call) -> bool:
    return not call.outcome.done()


def _asked(shop: Workshop, call: Call) -> str:
    return next(
        job.request.message_id
        for job in shop.jobs._jobs  # noqa: SLF001 - only the job knows its call
        if job._writer is not None and job._writer.append == call.send  # noqa: SLF001
    )


async def test_a_suspect_that_is_no_request_does_not_keep_the_others_waiting(redis_server: RedisServer) -> None:
    async with workshop(redis_server, start=False, max_deliveries=9) as shop:
        await shop.requests.ensure_group()
        garbage = shop.redis.xadd(shop.keys.requests("0"), {"a": "b"})
        suspects = [await shop.ask(f"m{n}") for n in range(2)]
        leave_pending(shop, 3, str(garbage), *suspects)
        shop.backend.always = lambda call: call.done("x")
        shop.start()
        await shop.idle()
        assert [letter["reason"] for letter in shop.dead()] == ["malformed"]
        assert len(shop.backend.calls) == 2


async def test_requests_left_by_the_dead_are_not_starved_by_new_ones(redis_server: RedisServer) -> None:
    async with workshop(redis_server, start=False, concurrency=1, sweep_interval="1h") as shop:
        await shop.requests.ensure_group()
        leave_pending(shop, 1, *[await shop.ask(f"old {n}") for n in range(3)])
        for n in range(10):
            await shop.ask(f"new {n}")
        shop.backend.always = lambda call: call.done("x")
        shop.start()
        await wait_until(lambda: shop.redis.xlen(shop.keys.requests("0")) == 0, "all are finished")
        ended = {key: shop.redis.xinfo_stream(key)["last-generated-id"] for key in shop.redis.scan_iter("*reply*")}
        assert all("old" in key for key in sorted(ended, key=lambda key: str(ended[key]))[:3])


async def test_a_claim_whose_answer_was_lost_is_no_further_death(redis_server: RedisServer) -> None:
    async with workshop(redis_server, start=False) as shop:
        await shop.requests.ensure_group()
        leave_pending(shop, 1, await shop.ask())
    async with (
        tcp_proxy(redis_server.port) as proxy,
        workshop(redis_server, start=False, url=proxy.url, redis_timeout="200ms", max_deliveries=3) as shop,
    ):
        traps = []
        shop.start()
        for _ in range(3):
            traps.append(trap := proxy.on_answer_to(LUA["claim"].digest.encode(), fate=Fate.SILENCE))
            await wait_until(lambda trap=trap: trap.sprung, "the reply to a claim is lost")
        (await shop.backend.call(1)).done("x")
        await shop.idle()
        assert shop.recorded() == ("done", "x")


async def test_a_pending_entry_that_somebody_deleted_is_forgotten(redis_server: RedisServer) -> None:
    async with workshop(redis_server, start=False) as shop:
        await shop.requests.ensure_group()
        gone = await shop.ask("gone")
        leave_pending(shop, 1, gone)
        shop.redis.xdel(shop.keys.requests("0"), gone)
        await shop.ask("there")
        shop.backend.always = lambda call: call.done("x")
        shop.start()
        await wait_until(lambda: shop.pending() == {}, "nothing is pending")
        await shop.idle()
        assert len(shop.backend.calls) == 1


async def test_a_message_whose_request_was_deleted_is_taken_over_by_a_resend(redis_server: RedisServer) -> None:
    async with workshop(redis_server) as shop:
        entry_id = await shop.ask()
        await shop.backend.call(1)
        await shop.crash()
        shop.redis.xdel(shop.keys.requests("0"), entry_id)
    async with workshop(redis_server) as shop:
        client = shop.follow()
        await shop.ask()
        (await shop.backend.call(1)).done("the answer")
        assert await client.end() == "done"
        await shop.idle()
        assert shop.recorded() == ("done", "the answer")


async def test_a_request_deleted_while_it_is_answered_leaves_the_message_to_its_resend(
    redis_server: RedisServer,
) -> None:
    async with workshop(redis_server) as shop:
        client = shop.follow()
        entry_id = await shop.ask()
        first = await shop.backend.call(1)
        first.send("first ")
        shop.redis.xdel(shop.keys.requests("0"), entry_id)
        await shop.ask()
        second = await shop.backend.call(2)
        first.send("more of the first")
        await wait_until(lambda: client.restarts == 1, "the second attempt has begun")
        second.send("second ")
        first.send("and more")
        second.send("attempt")
        second.done()
        assert await client.end() == "done"
        assert client.text == "second attempt"
        await wait_until(lambda: first.cancelled, "the first AI call is stopped")
        await wait_until(lambda: len(shop.jobs) == 0 and shop.pending() == {}, "nothing is left")
        assert shop.recorded() == ("done", "second attempt")


async def test_everything_lost_in_the_middle_of_an_answer_is_recovered_from_memory(redis_server: RedisServer) -> None:
    async with workshop(redis_server) as shop:
        client = shop.follow()
        await shop.ask()
        call = await shop.backend.call(1)
        call.send("before ")
        await wait_until(lambda: len(shop.entries()) == 3, "the text is recorded")
        shop.redis.flushall()
        call.send("after")
        await wait_until(lambda: len(shop.entries()) == 2, "all of it is recorded again")
        call.done()
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("before after", 0)
        await shop.idle()
        assert shop.recorded() == ("done", "before after")
        await shop.ask("next")  # the stream and its group exist again
        (await shop.backend.call(2)).done("x")
        await shop.idle()


async def test_a_request_read_while_the_node_drains_is_handed_back(redis_server: RedisServer) -> None:
    async with workshop(redis_server, start=False) as shop:
        read, arrived, go_on = shop.requests.read, asyncio.Event(), asyncio.Event()

        async def late(**how: object) -> list[Entry]:
            entries = await read(**how)  # type: ignore[arg-type]
            if entries:
                arrived.set()
                await go_on.wait()
            return entries

        shop.requests.read = late  # type: ignore[method-assign]
        shop.start()
        await shop.ask()
        await asyncio.wait_for(arrived.wait(), 5)
        shop.consumer.stop()
        shop.jobs.drain()
        go_on.set()
        assert shop.running is not None
        await asyncio.wait_for(shop.running, 5)
        shop.running = None
        assert list(shop.pending().values()) == [0]
        assert shop.backend.calls == []


async def test_a_node_that_starts_while_redis_is_full_drains_it(redis_server: RedisServer) -> None:
    backend = PlayedBackend()
    backend.always = lambda call: call.done("x" * 1000)
    async with workshop(redis_server, backend=backend, start=False) as shop:
        await shop.requests.ensure_group()
        for n in range(5):
            await shop.ask(f"m{n}")
        shop.redis.config_set("maxmemory", 1)
        shop.start()
        await shop.idle()
        assert {shop.recorded(f"m{n}") for n in range(5)} == {("done", "x" * 1000)}
        shop.redis.config_set("maxmemory", 0)
