"""Requests left pending by another process or by an accident are recovered."""

import asyncio

import pytest

from imstream.keys import GROUP
from imstream.model import Terminal
from imstream.store.requests import Entry
from imstream.store.scripts import LUA
from tests.redis.conftest import chat_request
from tests.redis.worker_harness import USER, Call, PlayedBackend, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until


def leave_pending(worker: WorkerHarness, deliveries: int, *entry_ids: str) -> None:
    """Make the entries pending as if a process had died with each of them `deliveries` times."""
    stream = worker.keys.requests("0")
    worker.redis.xreadgroup(GROUP, "0", {stream: ">"}, count=len(entry_ids))
    for entry_id in entry_ids:
        worker.redis.execute_command("XCLAIM", stream, GROUP, "0", 0, entry_id, "RETRYCOUNT", deliveries)


async def test_a_request_whose_worker_died_in_the_middle_is_answered_by_the_next_process(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        client = worker.follow()
        call = await worker.backend.call(1)
        call.send("half of ")
        await wait_until(lambda: len(worker.entries()) == 3, "half of it is recorded")
        call.send("an answer")  # shown to the client, not recorded
        await worker.crash()
        assert call.cancelled
    async with run_worker(redis_server) as worker:
        record = await worker.replies.read(USER, "m")
        assert record is not None
        reply = worker.buffers.get(USER, "m")
        reply.load(record)
        # The client resumes with more text than was recorded.
        client = worker.follow(attempt=1, offset=len(client.text), text=client.text)
        (await worker.backend.call(1)).done("the whole answer")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("the whole answer", 1)
        await worker.idle()
        assert worker.recorded() == ("done", "the whole answer")
        assert worker.entries()[-1]["attempt"] == "2"


@pytest.mark.parametrize("died_before", ["the end", "the acknowledgement", "the burial"])
async def test_a_request_is_ended_once_wherever_its_worker_died(redis_server: RedisServer, died_before: str) -> None:
    async with run_worker(redis_server, start=False) as worker:
        await worker.requests.ensure_group()
        entry_id = await worker.ask()
        leave_pending(worker, 1, entry_id)
        await worker.replies.open(USER, "m", request=f"0/{entry_id}")
        script = {"attempt": 1, "before": 0, "after": 4, "text": "text"}
        if died_before == "the acknowledgement":
            await worker.replies.append(USER, "m", **script, terminal=Terminal("done", "stop"))  # type: ignore[arg-type]
        elif died_before == "the burial":
            failed = Terminal("failed", reason="http_400", error="no such model")
            await worker.replies.append(USER, "m", **script, terminal=failed)  # type: ignore[arg-type]
        else:
            await worker.replies.append(USER, "m", **script)  # type: ignore[arg-type]
        worker.backend.always = lambda call: call.done("again")
        worker.start()
        await worker.idle()
        if died_before == "the end":
            assert worker.recorded() == ("done", "again")
            assert worker.dead() == []
        elif died_before == "the acknowledgement":
            assert worker.recorded() == ("done", "text")
            assert worker.dead() == []
        else:
            assert worker.recorded() == ("failed", "text")
            assert [letter["reason"] for letter in worker.dead()] == ["http_400"]
        assert len(worker.backend.calls) == (died_before == "the end")


async def test_a_request_that_was_read_but_never_heard_of_is_taken_up(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, sweep_interval="50ms") as worker:
        await wait_until(lambda: worker.consumer.reached_redis_within(1), "it is running")
        # Read under the node's name, as if Redis' reply had been lost.
        with worker.redis.pipeline() as both:
            both.xadd(worker.keys.requests("0"), _fields("lost"))
            both.xreadgroup(GROUP, "0", {worker.keys.requests("0"): ">"})
            both.execute()
        (await worker.backend.call(1)).done("x")
        await worker.idle()
        assert worker.recorded("lost") == ("done", "x")


def _fields(message_id: str) -> dict[str, str]:
    flat = chat_request(USER, message_id).fields()
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def test_a_request_that_killed_its_worker_too_often_is_buried_and_the_client_told(
    redis_server: RedisServer,
) -> None:
    for death in range(3):
        async with run_worker(redis_server, max_deliveries=3) as worker:
            if death == 0:
                await worker.ask()
            await worker.backend.call(1)
            assert list(worker.pending().values()) == [death + 1]
            await worker.crash()
    async with run_worker(redis_server, max_deliveries=3) as worker:
        await worker.idle()
        assert worker.recorded() == ("failed", "")
        [letter] = worker.dead()
        assert letter["reason"] == "worker_died"
        assert letter["error"] == "its worker died 3 times while working on it"
        assert worker.backend.calls == []


async def test_a_request_that_was_handed_back_in_good_order_has_not_died(redis_server: RedisServer) -> None:
    for _ in range(5):
        async with run_worker(redis_server, max_deliveries=2) as worker:
            if not worker.pending():
                await worker.ask()
            await worker.backend.call(1)
            await worker.stop()
            assert worker.backend.calls[0].cancelled
            assert list(worker.pending().values()) == [0]
    async with run_worker(redis_server, max_deliveries=2) as worker:
        (await worker.backend.call(1)).done("at last")
        await worker.idle()
        assert worker.recorded() == ("done", "at last")


async def test_every_pending_request_has_its_deaths_counted(redis_server: RedisServer) -> None:
    many = 1_010
    async with run_worker(redis_server, start=False, max_deliveries=3, queue_limit=many, redis_timeout="10s") as worker:
        await worker.requests.ensure_group()
        entry_ids = await asyncio.gather(*(worker.ask(f"m{n}", user=USER + n) for n in range(many)))
        leave_pending(worker, 3, *entry_ids)
        worker.backend.always = lambda call: call.done("x")
        worker.start()
        await worker.idle()
        assert worker.backend.calls == []
        assert len(worker.dead()) == many


async def test_suspects_run_one_at_a_time_and_beside_requests_that_are_none(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False, max_deliveries=9) as worker:
        await worker.requests.ensure_group()
        suspects = [await worker.ask(f"suspect-{n}") for n in range(3)]
        leave_pending(worker, 2, *suspects)
        await worker.ask("harmless")
        worker.start()
        await worker.backend.call(2)
        await wait_until(lambda: len(worker.pending()) == 4, "everything is delivered")
        for answered in range(3):
            await wait_until(lambda n=answered: len(worker.backend.calls) == n + 2, "one more suspect runs")
            assert len(worker.jobs) == 2
            next(call for call in worker.backend.calls if _open(call) and "suspect" in _asked(worker, call)).done("x")
        next(call for call in worker.backend.calls if _open(call)).done("x")
        await worker.idle()


def _open(call: Call) -> bool:
    return not call.outcome.done()


def _asked(worker: WorkerHarness, call: Call) -> str:
    return next(
        job.request.message_id
        for job in worker.jobs._jobs  # noqa: SLF001 - only the job has its call
        if job._writer is not None and job._writer.append == call.send  # noqa: SLF001
    )


async def test_a_suspect_that_is_no_request_does_not_keep_the_others_waiting(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False, max_deliveries=9) as worker:
        await worker.requests.ensure_group()
        garbage = worker.redis.xadd(worker.keys.requests("0"), {"a": "b"})
        suspects = [await worker.ask(f"m{n}") for n in range(2)]
        leave_pending(worker, 3, str(garbage), *suspects)
        worker.backend.always = lambda call: call.done("x")
        worker.start()
        await worker.idle()
        assert [letter["reason"] for letter in worker.dead()] == ["malformed"]
        assert len(worker.backend.calls) == 2


async def test_requests_left_by_the_dead_are_not_starved_by_new_ones(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False, concurrency=1, sweep_interval="1h") as worker:
        await worker.requests.ensure_group()
        leave_pending(worker, 1, *[await worker.ask(f"old-{n}") for n in range(3)])
        for n in range(10):
            await worker.ask(f"new-{n}")
        worker.backend.always = lambda call: call.done("x")
        worker.start()
        await wait_until(lambda: worker.redis.xlen(worker.keys.requests("0")) == 0, "all are finished")
        ended = {key: worker.redis.xinfo_stream(key)["last-generated-id"] for key in worker.redis.scan_iter("*reply*")}
        assert all("old" in key for key in sorted(ended, key=lambda key: str(ended[key]))[:3])


async def test_a_claim_whose_answer_was_lost_is_no_further_death(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        await worker.requests.ensure_group()
        leave_pending(worker, 1, await worker.ask())
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, start=False, url=proxy.url, redis_timeout="1s", max_deliveries=3) as worker,
    ):
        traps = []
        worker.start()
        for _ in range(3):
            traps.append(trap := proxy.on_answer_to(LUA["claim"].digest.encode(), fate=Fate.SILENCE))
            await wait_until(lambda trap=trap: trap.sprung, "the reply to a claim is lost")
        (await worker.backend.call(1)).done("x")
        await worker.idle()
        assert worker.recorded() == ("done", "x")


async def test_a_pending_entry_that_somebody_deleted_is_forgotten(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        await worker.requests.ensure_group()
        gone = await worker.ask("gone")
        leave_pending(worker, 1, gone)
        worker.redis.xdel(worker.keys.requests("0"), gone)
        await worker.ask("there")
        worker.backend.always = lambda call: call.done("x")
        worker.start()
        await wait_until(lambda: worker.pending() == {}, "nothing is pending")
        await worker.idle()
        assert len(worker.backend.calls) == 1


async def test_a_message_whose_request_was_deleted_is_taken_over_by_a_resend(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        entry_id = await worker.ask()
        await worker.backend.call(1)
        await worker.crash()
        worker.redis.xdel(worker.keys.requests("0"), entry_id)
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        (await worker.backend.call(1)).done("the answer")
        assert await client.end() == "done"
        await worker.idle()
        assert worker.recorded() == ("done", "the answer")


async def test_a_request_deleted_while_it_is_answered_leaves_the_message_to_its_resend(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        entry_id = await worker.ask()
        first = await worker.backend.call(1)
        first.send("first ")
        worker.redis.xdel(worker.keys.requests("0"), entry_id)
        await worker.ask()
        second = await worker.backend.call(2)
        first.send("more of the first")
        await wait_until(lambda: client.restarts == 1, "the second attempt has begun")
        second.send("second ")
        first.send("and more")
        second.send("attempt")
        second.done()
        assert await client.end() == "done"
        assert client.text == "second attempt"
        await wait_until(lambda: first.cancelled, "the first AI call is stopped")
        await wait_until(lambda: len(worker.jobs) == 0 and worker.pending() == {}, "nothing is left")
        assert worker.recorded() == ("done", "second attempt")


async def test_everything_lost_in_the_middle_of_an_answer_is_recovered_from_memory(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("before ")
        await wait_until(lambda: len(worker.entries()) == 3, "the text is recorded")
        worker.redis.flushall()
        call.send("after")
        await wait_until(lambda: len(worker.entries()) == 2, "all of it is recorded again")
        call.done()
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("before after", 0)
        await worker.idle()
        assert worker.recorded() == ("done", "before after")
        await worker.ask("next")  # the stream and its group exist again
        (await worker.backend.call(2)).done("x")
        await worker.idle()


async def test_a_request_read_while_the_node_drains_is_handed_back(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        read, arrived, go_on = worker.requests.read, asyncio.Event(), asyncio.Event()

        async def late(**how: object) -> list[Entry]:
            entries = await read(**how)  # type: ignore[arg-type]
            if entries:
                arrived.set()
                await go_on.wait()
            return entries

        worker.requests.read = late  # type: ignore[method-assign]
        worker.start()
        await worker.ask()
        await asyncio.wait_for(arrived.wait(), 5)
        worker.consumer.stop()
        worker.jobs.drain()
        go_on.set()
        assert worker.running is not None
        await asyncio.wait_for(worker.running, 5)
        worker.running = None
        assert list(worker.pending().values()) == [0]
        assert worker.backend.calls == []


async def test_a_node_that_starts_while_redis_is_full_drains_it(redis_server: RedisServer) -> None:
    backend = PlayedBackend()
    backend.always = lambda call: call.done("x" * 1000)
    async with run_worker(redis_server, backend=backend, start=False) as worker:
        await worker.requests.ensure_group()
        for n in range(5):
            await worker.ask(f"m{n}")
        worker.redis.config_set("maxmemory", 1)
        worker.start()
        await worker.idle()
        assert {worker.recorded(f"m{n}") for n in range(5)} == {("done", "x" * 1000)}
        worker.redis.config_set("maxmemory", 0)
