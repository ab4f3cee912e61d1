"""The worker in this process: it reads, answers, records and finishes requests; a failing request affects no other."""

import pytest

from imstream.ai.backend import PromptMessage
from imstream.errors import BackendError
from imstream.model import Terminal
from imstream.worker.jobs import TOGETHER
from tests.redis.conftest import chat_request
from tests.redis.worker_harness import USER, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


async def test_a_request_is_answered_recorded_and_finished(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        follower = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        assert call.messages == [
            PromptMessage("user", "hi"),
            PromptMessage("assistant", "hello"),
            PromptMessage("user", "你好"),
        ]
        call.send("你好,")
        assert follower.text == "你好,"  # shown before it is recorded
        await wait_until(lambda: len(worker.entries()) == 3, "the text is recorded while the answer goes on")
        call.done("世界", "!", finish_reason="length", usage={"total_tokens": 7})
        assert await follower.end() == "done"
        assert follower.terminal == Terminal("done", "length", {"total_tokens": 7})
        assert follower.text == "你好,世界!"
        await worker.idle()
        assert worker.recorded() == ("done", "你好,世界!")
        assert [entry["event"] for entry in worker.entries()] == ["queued", "opened", "text", "done"]
        assert worker.dead() == []


async def test_an_answer_that_nobody_reads_on_another_node_is_recorded_in_one_round_of_three(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, flush_interval="1h") as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        for number in range(6):
            call.send(str(number))
            await worker.jobs.flush(number)
        assert [entry["event"] for entry in worker.entries()] == ["queued", "opened", "text", "text"]
        call.done()
        await worker.idle()
        assert worker.recorded() == ("done", "012345")


async def test_an_answer_that_is_read_on_another_node_is_recorded_in_every_round(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, flush_interval="1h") as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        worker.redis.sadd(worker.keys.route(USER), "elsewhere")
        worker.redis.pexpire(worker.keys.route(USER), 60_000)
        call.send("hello ")
        for number in range(3):  # one of them notifies the other node, and finds out that there is one
            await worker.jobs.flush(number)
        for number in range(3):
            call.send(str(number))
            await worker.jobs.flush(number)
            assert worker.recorded_text() == "hello 012"[: 7 + number]
        assert worker.redis.xlen(worker.keys.inbox("elsewhere")) == 4
        call.done()
        await worker.idle()


async def test_an_answer_is_recorded_in_every_round_when_the_other_node_was_there_before(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, flush_interval="1h") as worker:
        worker.redis.sadd(worker.keys.route(USER), "elsewhere")
        worker.redis.pexpire(worker.keys.route(USER), 60_000)
        await worker.ask()
        call = await worker.backend.call(1)
        for number in range(3):
            call.send(str(number))
            await worker.jobs.flush(number)
            assert worker.recorded_text() == "012"[: 1 + number]
        call.done()
        await worker.idle()


async def test_many_answers_are_recorded_a_share_in_each_round(redis_server: RedisServer) -> None:
    messages = [f"m{number}" for number in range(2 * TOGETHER)]
    async with run_worker(redis_server, flush_interval="1h", concurrency=100, user_limit=100) as worker:
        for message_id in messages:
            await worker.ask(message_id)
        await worker.backend.call(len(messages))
        for call in worker.backend.calls:
            call.send("hello")
        recorded = [0]
        for number in range(3):
            await worker.jobs.flush(number)
            recorded.append(sum(worker.recorded_text(message_id) == "hello" for message_id in messages))
        assert sorted(set(recorded)) == recorded  # more in each round
        assert recorded[-1] == len(messages)
        for call in worker.backend.calls:
            call.done()
        await worker.idle()


async def test_requests_that_came_before_the_worker_are_answered(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        await worker.ask()
        worker.backend.always = lambda call: call.done("hi")
        worker.start()
        await worker.idle()
        assert worker.recorded() == ("done", "hi")


async def test_no_more_requests_run_at_once_than_there_are_slots(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, concurrency=2) as worker:
        for n in range(5):
            await worker.ask(f"m{n}")
        for finished in range(5):
            await worker.backend.call(min(finished + 2, 5))
            assert len(worker.backend.calls) <= finished + 2
            assert len(worker.pending()) <= 2
            assert len(worker.jobs) <= 2
            worker.backend.calls[finished].done("x")
        await worker.idle()


async def test_a_client_sees_the_end_only_when_it_is_recorded(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        recorded_at_end: list[str] = []
        reply = worker.buffers.get(USER, "m")

        def look(_: object) -> None:
            if reply.terminal is not None:
                recorded_at_end.append(worker.recorded()[1])

        reply.subscribe(look)
        await worker.ask()
        (await worker.backend.call(1)).done("all ", "of it")
        await worker.idle()
        assert recorded_at_end == ["all of it"]


async def test_a_defect_in_one_request_buries_it_and_the_others_go_on(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        follower = worker.follow("bad")
        await worker.ask("bad")
        await worker.ask("good")
        await worker.backend.call(2)
        bad, good = worker.backend.calls
        bad.send("so far")
        bad.fail(ZeroDivisionError("a defect"))
        assert await follower.end() == "failed"
        good.done("fine")
        await worker.idle()
        assert worker.recorded("bad") == ("failed", "so far")
        assert worker.recorded("good") == ("done", "fine")
        [letter] = worker.dead()
        assert (letter["message_id"], letter["reason"]) == ("bad", "internal_error")
        assert letter["error"] == "ZeroDivisionError: a defect"


@pytest.mark.parametrize("reply_stream", ["another type", "no event", "usage that is no JSON"])
async def test_a_reply_stream_that_was_tampered_with_stops_nobody_else(
    redis_server: RedisServer, reply_stream: str
) -> None:
    async with run_worker(redis_server) as worker:
        key = worker.keys.reply(USER, "bad")
        match reply_stream:
            case "another type":
                worker.redis.set(key, "x", px=60_000)
            case "no event":
                worker.redis.xadd(key, {"attempt": "0", "offset": "0"})
                worker.redis.xadd(key, {"attempt": "0", "offset": "0", "event": "done"})
            case _:
                worker.redis.xadd(key, {"attempt": "1", "offset": "0", "event": "done", "usage": "{"})
        worker.redis.pexpire(key, 60_000)
        worker.backend.always = lambda call: call.done("fine")
        await worker.requests.admit(chat_request(USER, "bad"))
        await worker.ask("good")
        await wait_until(lambda: worker.redis.xlen(worker.keys.requests("0")) == 1, "the other request is finished")
        assert worker.recorded("good") == ("done", "fine")
        await worker.ask("another")
        await wait_until(lambda: worker.redis.xlen(worker.keys.requests("0")) == 1, "a later one is finished, too")
        assert worker.recorded("another") == ("done", "fine")
        assert len(worker.backend.calls) == 2


@pytest.mark.parametrize("fields", [{"user": "nobody", "message_id": "m"}, {"a": "b"}, {"user": "10001"}])
async def test_an_entry_that_is_no_request_is_buried(redis_server: RedisServer, fields: dict[str, str]) -> None:
    async with run_worker(redis_server) as worker:
        worker.redis.xadd(worker.keys.requests("0"), fields)
        await worker.ask("good")
        (await worker.backend.call(1)).done("fine")
        await worker.idle()
        [letter] = worker.dead()
        assert letter["reason"] == "malformed"
        assert fields.items() <= letter.items()


async def test_the_same_message_twice_is_answered_once(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        first = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("one ")
        second = worker.follow()
        await worker.ask()  # sent again during the answer
        await wait_until(lambda: worker.redis.xlen(worker.keys.requests("0")) == 1, "the duplicate is finished")
        call.done("answer")
        assert await first.end() == await second.end() == "done"
        await worker.idle()
        third = worker.follow()
        await worker.ask()  # sent again after the end, when this process has forgotten it
        assert await third.end() == "done"
        await worker.idle()
        assert {first.text, second.text, third.text} == {"one answer"}
        assert len(worker.backend.calls) == 1


async def test_a_duplicate_of_a_refused_message_is_told_the_same_and_buried_once(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(BackendError("http_400", "no such model", kind="impossible"))
        await worker.idle()
        again = worker.follow()
        await worker.ask()
        assert await again.end() == "failed"
        assert again.terminal == Terminal("failed", reason="http_400", error="no such model")
        await worker.idle()
        assert len(worker.dead()) == 1
        assert len(worker.backend.calls) == 1


async def test_messages_of_two_users_with_the_same_id_are_two_messages(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask(user=10001)
        await worker.ask(user=10002)
        await worker.backend.call(2)
        for number, call in enumerate(worker.backend.calls):
            call.done(str(number))
        await worker.idle()
        assert {worker.recorded(user=user)[1] for user in (10001, 10002)} == {"0", "1"}


async def test_nothing_is_held_for_a_message_that_has_ended(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        worker.backend.always = lambda call: call.done("x")
        for n in range(10):
            await worker.ask(f"m{n}")
        await worker.idle()
        worker.backend.calls.clear()
        assert len(worker.buffers) == 0


async def test_a_worker_that_is_told_to_stop_finishes_what_it_has_begun(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask("begun")
        call = await worker.backend.call(1)
        worker.consumer.stop()
        assert worker.consumer.stopping
        await worker.no_longer_reads()
        await worker.ask("later")
        call.done("x")
        assert worker.running is not None
        await worker.running
        assert worker.recorded("begun") == ("done", "x")
        assert worker.redis.xlen(worker.keys.requests("0")) == 1


async def test_readiness_follows_what_the_worker_hears_from_redis(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        assert not worker.consumer.reached_redis_within(60)
        worker.start()
        await wait_until(lambda: worker.consumer.reached_redis_within(1), "the worker reaches Redis")
        for n in range(64):
            await worker.ask(f"m{n}")
        await wait_until(lambda: len(worker.backend.calls) == 64, "all slots are taken")
        worker.redis.config_resetstat()
        await wait_until(lambda: "cmdstat_exists" in worker.redis.info("commandstats"), "it pings Redis")
        for call in worker.backend.calls:
            call.done("x")
        await worker.idle()
