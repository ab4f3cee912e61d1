"""Requests that need not wait: admitted, delivered and opened in one step; and ended and removed in one."""

import asyncio
import itertools
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.errors import BackendError, StoreUnavailable
from imstream.keys import GROUP
from imstream.model import Terminal
from imstream.redis.client import Script
from imstream.store.replies import Appended, Duplicate, Opened, Opening, Rejected
from imstream.store.requests import Admitted, QueueFull
from imstream.store.scripts import LUA
from tests.redis.conftest import Store, chat_request
from tests.redis.worker_harness import USER, Call, run_worker
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until


async def begin(store: Store, message_id: str = "m", *, user: int = USER) -> Admitted | QueueFull:
    request = chat_request(user, message_id)
    request_id = store.requests.request_id("")
    opening = store.replies.opening(user, message_id, request.question, request=request_id, after=0, word="w")
    return await store.requests.begin(request, opening)


def pending(store: Store) -> int:
    return int(store.redis.xpending(store.keys.requests("0"), GROUP)["pending"])


async def test_a_request_that_nothing_is_before_is_delivered_and_opened(store: Store) -> None:
    await store.requests.ensure_group()
    admitted = await begin(store)
    assert isinstance(admitted, Admitted)
    assert (admitted.position, admitted.opened) == (1, Opened(1))
    assert pending(store) == 1
    assert await store.requests.read(count=9, block=None) == []
    reopened = await store.replies.open(USER, "m", request=store.requests.request_id(admitted.entry_id))
    assert reopened == Opened(2), "the reply belongs to the request"


async def test_a_request_that_another_one_is_before_waits_for_it(store: Store) -> None:
    await store.requests.ensure_group()
    await store.requests.admit(chat_request(USER + 1, "before"))
    admitted = await begin(store)
    assert isinstance(admitted, Admitted)
    assert (admitted.position, admitted.opened, pending(store)) == (2, None, 0)
    assert await store.replies.read(USER, "m") is None
    assert [one.fields["message_id"] for one in await store.requests.read(count=9, block=None)] == ["before", "m"]


async def test_a_request_that_does_not_fit_is_not_begun(store: Store) -> None:
    await store.requests.ensure_group()
    for number in range(2):
        await begin(store, f"m{number}")
    assert await begin(store) == QueueFull(by_user=True)
    for number in range(3):
        await begin(store, user=USER + 1 + number)
    assert await begin(store, user=USER + 9) == QueueFull(by_user=False)
    assert await store.replies.read(USER, "m") is None


async def test_a_message_that_is_being_answered_already_is_admitted_as_a_duplicate(store: Store) -> None:
    await store.requests.ensure_group()
    first, second = await begin(store), await begin(store)
    assert isinstance(first, Admitted)
    assert isinstance(second, Admitted)
    assert second.opened == Duplicate(store.requests.request_id(first.entry_id))


async def test_a_request_whose_reply_cannot_be_opened_is_in_the_stream(store: Store) -> None:
    await store.requests.ensure_group()
    store.redis.set(store.keys.reply(USER, "m"), "written by hand", px=60_000)
    admitted = await begin(store)
    assert isinstance(admitted, Admitted)
    assert admitted.opened is None
    assert await store.requests.unfinished() == 1


async def test_a_request_is_removed_with_its_end_unless_the_end_is_refused(store: Store) -> None:
    await store.requests.ensure_group()
    await store.requests.admit(chat_request(USER, "m"))
    [entry] = await store.requests.read(count=1, block=None)
    await store.replies.open(USER, "m", request=store.requests.request_id(entry.entry_id))

    async def end(attempt: int, before: int = 0) -> Appended | Rejected:
        return await store.replies.append(
            *(USER, "m"),
            attempt=attempt,
            before=before,
            after=before + 2,
            text="hi",
            terminal=Terminal("done"),
            removal=store.requests.removal(entry),
        )

    assert await end(attempt=2) == Rejected("superseded")
    assert await end(attempt=1, before=7) == Rejected("gap")
    assert await store.requests.unfinished() == 1
    for _ in range(2):  # the answer may be lost
        result = await end(attempt=1)
        assert isinstance(result, Appended)
        assert result.removed
        assert (await store.requests.unfinished(), pending(store)) == (0, 0)
        assert not store.redis.exists(store.keys.load("0"))


async def test_a_chat_that_need_not_wait_takes_two_round_trips(redis_server: RedisServer) -> None:
    async with tcp_proxy(redis_server.port) as proxy, run_worker(redis_server, url=proxy.url) as worker:
        await worker.load_scripts()
        others = [
            proxy.on_answer_to(LUA[name].digest.encode(), fate=Fate.DELAY) for name in ("admit", "open", "finish")
        ]
        await worker.consumer.admit(chat_request(USER, "m"))
        assert worker.buffers.get(USER, "m").has_writer
        (await worker.backend.call(1)).done("answer")
        await worker.idle()
        assert worker.recorded() == ("done", "answer")
        assert not any(trap.sprung for trap in others)


async def test_no_more_requests_run_than_there_are_slots(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, concurrency=3) as worker:
        most = answered = 0

        def answer(call: Call) -> None:
            nonlocal most
            most = max(most, len(worker.jobs))
            asyncio.get_running_loop().call_later(0.02, lambda: call.done("x"))

        worker.backend.always = answer
        for wave in range(3):
            await worker.reads()
            admissions = await asyncio.gather(
                *(worker.consumer.admit(chat_request(USER, f"m{wave}-{number}")) for number in range(6))
            )
            assert all(isinstance(one, Admitted) for one in admissions)
            answered += len(admissions)
            await worker.idle()
        assert most == 3
        assert all(worker.recorded(f"m{wave}-{number}") == ("done", "x") for wave in range(3) for number in range(6))
        assert len(worker.backend.calls) == answered


@pytest.mark.parametrize("fate", [Fate.SILENCE, Fate.CUT])
async def test_a_request_whose_admission_has_lost_its_answer_is_answered(redis_server: RedisServer, fate: Fate) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s", sweep_interval="1h") as worker,
    ):
        await worker.load_scripts()
        worker.backend.always = lambda call: call.done("answer")
        lost = proxy.on_answer_to(LUA["begin"].digest.encode(), fate=fate)
        with pytest.raises(StoreUnavailable):
            await worker.consumer.admit(chat_request(USER, "m"))
        assert lost.sprung
        await worker.idle()
        assert worker.recorded() == ("done", "answer")
        assert len(worker.backend.calls) == 1


@pytest.mark.parametrize("is_loaded", [False, True])
async def test_an_attempt_whose_admission_has_lost_its_answer_is_the_first_one(
    redis_server: RedisServer, *, is_loaded: bool
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s", sweep_interval="1h", max_attempts=2) as worker,
    ):
        await worker.load_scripts()
        worker.redis.sadd(worker.keys.route(USER), "elsewhere")
        worker.redis.pexpire(worker.keys.route(USER), 60_000)
        await worker.reads()
        lost = proxy.on_answer_to(LUA["begin"].digest.encode(), fate=Fate.SILENCE)
        admitting = asyncio.create_task(worker.consumer.admit(chat_request(USER, "m")))
        await wait_until(lambda: lost.sprung and worker.entries(), "it is begun")
        reply = worker.buffers.get(USER, "m")
        if is_loaded:  # a socket resumes before the request gets a job
            record = await worker.replies.read(USER, "m")
            assert record is not None
            reply.load(record)
        with pytest.raises(StoreUnavailable):
            await admitting
        (await worker.backend.call(1)).fail(BackendError("cut"))
        (await worker.backend.call(2)).done("answer")
        await worker.idle()
        assert worker.recorded() == ("done", "answer")
        assert worker.attempts() == [1, 2]
        assert worker.begun == ["m"]
        notices = worker.redis.xrange(worker.keys.inbox("elsewhere"))
        assert [notice["event"] for _, notice in notices].count("begun") == 1


async def test_an_attempt_of_a_process_before_is_not_taken_for_one_whose_answer_was_lost(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_worker(redis_server, flush_interval="1h", sweep_interval="50ms") as before:
        await before.reads()
        await before.ask()
        call = await before.backend.call(1)
        client = before.follow()
        call.send("Once upon a time ")
        await wait_until(lambda: client.text == "Once upon a time ", "it is shown")
        await before.crash()
        async with run_worker(redis_server, flush_interval="1h", sweep_interval="50ms", start=False) as worker:
            begin, tries = worker.replies.open, itertools.count()

            async def refused_once(*args: Any, **given: Any) -> Opening:  # noqa: ANN401 - those of `open`
                if next(tries) == 0:
                    raise StoreUnavailable("NOREPLICAS Not enough good replicas to write.")
                return await begin(*args, **given)

            monkeypatch.setattr(worker.replies, "open", refused_once)
            worker.start()
            again = worker.follow(attempt=1, offset=len(client.text), text=client.text)
            (await worker.backend.call(1)).done("Anna went home.")
            assert await again.end() == "done"
            await worker.idle()
            assert (again.text, again.restarts) == ("Anna went home.", 1)
            assert worker.recorded() == ("done", "Anna went home.")
            assert worker.attempts() == [1, 2]


async def test_a_request_whose_admission_is_cancelled_is_answered_by_its_first_attempt(
    redis_server: RedisServer,
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s", sweep_interval="1h") as worker,
    ):
        await worker.load_scripts()
        proxy.on_answer_to(LUA["begin"].digest.encode(), fate=Fate.DELAY, delay=0.2)
        admitting = asyncio.create_task(worker.consumer.admit(chat_request(USER, "m")))
        await wait_until(worker.entries, "it is begun")
        admitting.cancel()
        (await worker.backend.call(1)).done("answer")
        await worker.idle()
        assert worker.recorded() == ("done", "answer")
        assert (worker.attempts(), worker.begun) == ([1], ["m"])


async def test_an_attempt_whose_job_redis_has_refused_is_not_taken_for_one_without_a_job(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server) as worker:
        await worker.reads()
        await worker.consumer.admit(chat_request(USER, "m"))
        call = await worker.backend.call(1)
        reply = worker.keys.reply(USER, "m")
        worker.redis.rename(reply, f"{reply}:aside")
        worker.redis.set(reply, "written by hand", px=60_000)
        call.done("answer")
        await wait_until(lambda: len(worker.jobs) == 0, "its end is refused")
        worker.redis.rename(f"{reply}:aside", reply)
        (await worker.backend.call(2)).done("answer")
        await worker.idle()
        assert worker.recorded() == ("done", "answer")
        assert worker.attempts() == [1, 2]


async def test_a_request_that_begins_is_not_taken_for_one_without_a_job(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s", sweep_interval="50ms", read_block="20ms") as worker,
    ):
        await worker.load_scripts()
        late = proxy.on_answer_to(LUA["begin"].digest.encode(), fate=Fate.DELAY, delay=0.5)
        with capture_logs() as logs:
            await worker.consumer.admit(chat_request(USER, "m"))
            assert late.sprung
            (await worker.backend.call(1)).done("answer")
            await worker.idle()
        assert worker.recorded() == ("done", "answer")
        assert worker.attempts() == [1]
        assert "request claimed" not in {line["event"] for line in logs}


async def test_an_end_whose_answer_was_lost_is_counted_once(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s") as worker,
    ):
        await worker.load_scripts()
        await worker.ask()
        call = await worker.backend.call(1)
        lost = proxy.on_answer_to(LUA["end"].digest.encode(), fate=Fate.SILENCE)
        call.done("answer")
        assert await worker.follow().end() == "done"
        await worker.idle()
        assert lost.sprung
        assert worker.metrics.messages["done"] == 1


@pytest.mark.parametrize("end", ["done", "failed"])
async def test_an_end_is_counted_although_redis_fails_right_after_it_is_recorded(
    redis_server: RedisServer, end: str
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s") as worker,
    ):
        await worker.load_scripts()
        await worker.ask()
        await worker.backend.call(1)
        await worker.crash()  # the next process does not know when the first attempt began
        worker.start()
        call = await worker.backend.call(2)
        lost = proxy.on_answer_to(b"XRANGE", worker.keys.reply(USER, "m").encode(), fate=Fate.SILENCE)
        if end == "done":  # its request is removed by now; else it is claimed again
            call.done("answer")
        else:
            call.fail(BackendError("http_400", kind="impossible"))
        await worker.idle()
        assert lost.sprung
        assert worker.recorded()[0] == end
        assert worker.metrics.messages[end] == 1


async def test_a_message_that_is_cancelled_while_it_begins_is_not_answered(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s") as worker,
    ):
        await worker.load_scripts()
        client = worker.follow()
        proxy.on_answer_to(LUA["begin"].digest.encode(), fate=Fate.DELAY, delay=1.0)
        admitting = asyncio.create_task(worker.consumer.admit(chat_request(USER, "m")))
        await wait_until(worker.entries, "Redis has begun it")  # before that, nobody knows it
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        await admitting
        await worker.idle()
        assert await client.end() == "cancelled"
        assert worker.backend.calls == []


async def test_keys_of_several_slots_are_used_one_after_the_other_where_a_server_insists(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_worker(redis_server) as worker:
        refusing = Script('return redis.error_reply("CROSSSLOT Keys in request don\'t hash to the same slot")')
        for name in ("begin", "end"):
            monkeypatch.setitem(LUA, name, refusing)
        for number in (1, 2):
            await worker.reads()
            await worker.consumer.admit(chat_request(USER, f"m{number}"))
            (await worker.backend.call(number)).done("answer")
            await worker.idle()
            assert worker.recorded(f"m{number}") == ("done", "answer")
        assert not worker.requests.shares_server
