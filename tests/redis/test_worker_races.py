"""The worker when replies of Redis are late, lost, or out of order."""

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.errors import BackendError
from imstream.keys import GROUP
from imstream.model import Record, Terminal
from imstream.store.replies import Appended, Rejected
from imstream.store.scripts import LUA
from imstream.worker.reply_writer import ReplyWriter
from tests.redis.conftest import chat_request
from tests.redis.worker_harness import USER, Call, run_worker
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until

ON_SERVERS = ["valkey"]

APPEND, NOTIFY = LUA["append"].digest.encode(), LUA["notify"].digest.encode()


async def test_the_backend_is_called_and_the_answer_ends_beside_a_slow_notice_to_another_node(
    redis_server: RedisServer,
) -> None:
    with capture_logs() as logs:
        async with tcp_proxy(redis_server.port) as proxy, run_worker(redis_server, url=proxy.url) as worker:
            inbox = worker.keys.inbox("elsewhere")
            worker.redis.sadd(worker.keys.route(USER), "elsewhere")
            worker.redis.pexpire(worker.keys.route(USER), 60_000)
            await worker.load_scripts()
            trap = proxy.on_answer_to(NOTIFY, b"begun", fate=Fate.SILENCE)
            late = list[bool]()

            def answer(call: Call) -> None:
                late.append("notice not sent" in {entry["event"] for entry in logs})
                call.done("one")

            worker.backend.always = answer
            await worker.requests.admit(chat_request(USER, "m"))  # without a mark, which could be lost with the notice
            assert await worker.follow().end() == "done"
            await worker.idle()
            assert trap.sprung
            assert late == [False]
            assert "notice not sent" in {entry["event"] for entry in logs}
            assert [notice["event"] for _, notice in worker.redis.xrange(inbox)] == ["begun", "grew"]


@pytest.mark.parametrize("fate", [Fate.SILENCE, Fate.CUT])
async def test_text_goes_on_after_an_append_whose_answer_was_lost(redis_server: RedisServer, fate: Fate) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s") as worker,
    ):
        await worker.load_scripts()
        await worker.ask()
        follower = worker.follow()
        call = await worker.backend.call(1)
        trap = proxy.on_answer_to(APPEND, fate=fate)
        call.send("one ")
        await wait_until(lambda: trap.sprung, "the append has reached Redis")
        call.send("two ")  # more, before the first is known to be recorded
        await wait_until(
            lambda: "two " in [entry.get("text") for entry in worker.entries()], "the rest is recorded too"
        )
        call.done("three")
        assert await follower.end() == "done"
        assert worker.recorded() == ("done", "one two three")
        assert (follower.text, follower.restarts) == ("one two three", 0)
        assert len(worker.backend.calls) == 1


async def test_a_flush_that_waited_for_the_end_reports_no_attempt_that_was_superseded(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = list[asyncio.Task[None]]()
    original = ReplyWriter.end
    with capture_logs() as logs:
        async with run_worker(redis_server) as worker:

            async def end(writer: ReplyWriter, terminal: Terminal) -> Appended | Rejected:
                """Flush in the same turn of the event loop, as for a job that was about to be flushed."""
                flushes.extend(asyncio.create_task(job.flush()) for job in worker.jobs)
                return await original(writer, terminal)

            monkeypatch.setattr(ReplyWriter, "end", end)
            await worker.ask()
            (await worker.backend.call(1)).done("one")
            assert await worker.follow().end() == "done"
            await worker.idle()
            await asyncio.gather(*flushes)
    assert len(flushes) == 1
    assert "reply stream rejects this attempt" not in {entry["event"] for entry in logs}


async def test_an_end_is_recorded_after_an_append_whose_answer_was_lost(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s") as worker,
    ):
        await worker.load_scripts()
        await worker.ask()
        call = await worker.backend.call(1)
        trap = proxy.on_answer_to(APPEND, fate=Fate.SILENCE)
        call.send("one ")
        await wait_until(lambda: trap.sprung, "the append has reached Redis")
        call.done("two")
        await worker.idle()
        assert worker.recorded() == ("done", "one two")
        assert len(worker.backend.calls) == 1


async def test_the_next_attempt_begins_when_nothing_of_the_one_before_is_on_its_way(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, retry_wait="1ms", sweep_interval="1h") as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        job = worker.jobs.find(USER, "m")
        assert job is not None
        call.send("lost")
        append, release = worker.replies.append, asyncio.Event()

        async def late(*args: object, **kwargs: object) -> object:
            await release.wait()
            return await append(*args, **kwargs)  # type: ignore[arg-type]

        worker.replies.append = late  # type: ignore[method-assign, assignment]
        flushing = asyncio.create_task(job.flush())
        await asyncio.sleep(0)
        worker.replies.append = append  # type: ignore[method-assign]
        call.fail(BackendError("http_503"))
        await wait_until(lambda: job._writer is None, "the first attempt is over")  # noqa: SLF001 - the state of the race
        assert [entry["event"] for entry in worker.entries()] == ["queued", "opened"]
        release.set()
        (await worker.backend.call(2)).done("kept")
        await flushing
        await worker.idle()
        assert worker.recorded() == ("done", "kept")
        assert len(worker.backend.calls) == 2


async def test_when_redis_lost_everything_between_two_attempts_their_texts_are_not_mixed(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, retry_wait="1ms") as worker:
        await worker.ask()
        follower = worker.follow()
        call = await worker.backend.call(1)
        call.send("first try")
        worker.redis.flushall()
        call.fail(BackendError("http_503"))
        (await worker.backend.call(2)).done("and the second")
        assert await follower.end() == "done"
        assert follower.text == "and the second"
        assert worker.recorded() == ("done", "and the second")


async def test_a_message_sent_again_after_redis_lost_everything_is_answered_by_one_of_both(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, flush_interval="1h") as worker:
        await worker.ask()
        follower = worker.follow()
        first = await worker.backend.call(1)
        first.send("1 ")
        worker.redis.flushall()
        await wait_until(lambda: worker.redis.exists(worker.keys.requests("0")), "the group is created again")
        await worker.ask()  # the client sends it again
        second = await worker.backend.call(2)
        for n in range(5):
            first.send("1 ")
            second.send(f"2.{n} ")
        first.done("1 ")
        second.done("2 ")
        assert await follower.end() == "done"
        await worker.idle()
        event, text = worker.recorded()
        assert event == "done"
        assert follower.text == text
        assert text == "2.0 2.1 2.2 2.3 2.4 2 "


async def test_a_call_that_fails_after_the_request_was_taken_over_is_not_tried_again(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, sweep_interval="1h") as frozen:
        entry_id = await frozen.ask()
        call = await frozen.backend.call(1)
        stream = frozen.keys.requests("0")
        # As an adopter does when the lease has expired; it has not opened the reply yet.
        frozen.redis.xclaim(stream, GROUP, "1", 0, [entry_id], justid=True)
        call.fail(BackendError("http_503", "it took too long"))
        await wait_until(lambda: len(frozen.jobs) == 0, "the job has ended")
        assert [entry["event"] for entry in frozen.entries()].count("opened") == 1
        assert [row["consumer"] for row in frozen.redis.xpending_range(stream, GROUP, "-", "+", 2)] == ["1"]


async def test_a_record_that_is_read_late_does_not_replace_a_later_one(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A duplicate shows the record of the answer, while its next attempt begins and is shown."""
    async with run_worker(redis_server) as worker, run_worker(redis_server, node="1") as other:
        await other.requests.admit(chat_request(USER, "m"))
        (await other.backend.call(1)).send("one")
        await wait_until(lambda: other.entries()[-1].get("text") == "one", "the text is recorded")
        client = worker.follow()
        read = worker.replies.read

        async def read_late(*message: Any) -> Record | None:  # noqa: ANN401 - as of `read`
            record = await read(*message)
            if len(other.backend.calls) == 1:
                other.backend.calls[0].fail(BackendError("broken_stream", "cut"))
                (await other.backend.call(2)).send("two")
                await wait_until(lambda: other.entries()[-1].get("text") == "two", "the text is recorded")
                later = await read(*message)
                assert later is not None
                worker.buffers.get(USER, "m").load(later)
            return record

        monkeypatch.setattr(worker.replies, "read", read_late)
        await worker.ask()
        await worker.idle()
        assert (client.text, client.restarts) == ("two", 0)
        other.backend.calls[1].done()
        await wait_until(lambda: other.entries()[-1]["event"] == "done", "it has ended")


async def test_nobody_waits_for_a_duplicate_to_begin_once_its_job_has_ended(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker, run_worker(redis_server, node="1") as other:
        await other.requests.admit(chat_request(USER, "m"))
        call = await other.backend.call(1)
        reply, record = worker.buffers.get(USER, "m"), await worker.replies.read(USER, "m")
        assert record is not None
        reply.load(record)  # so that its job changes nothing
        begun = asyncio.create_task(reply.wait_until_recorded(3600))
        await asyncio.sleep(0)  # it waits
        await worker.ask()
        assert not await asyncio.wait_for(begun, 30)
        call.done("x")
        await wait_until(lambda: other.entries()[-1]["event"] == "done", "it has ended")
