"""Each message has one log line and is counted once, however it ended, and however many nodes worked on it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.codes import Code
from imstream.errors import BackendError
from imstream.guards.chain import GuardChain
from imstream.guards.guard import Guard, Reject
from imstream.model import ChatRequest, Terminal
from imstream.store.requests import Entry
from imstream.store.scripts import LUA
from imstream.texts import Sentence
from tests.redis.conftest import chat_request
from tests.redis.test_worker_retried import retried
from tests.redis.worker_harness import USER, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until

ON_SERVERS = ["valkey"]

Line = dict[str, Any]

NAMES = [
    *("user", "message_id", "trace", "outcome", "reason", "node", "stream", "backend", "attempts", "continued"),
    *("queue_wait_ms", "first_delta_ms", "total_ms", "tokens_in", "tokens_out", "characters"),
    *("sockets", "slow_sockets"),
]


class _Declines(Guard):
    """Rejects every message in the worker."""

    async def check_ai_call(self, request: ChatRequest) -> Reject:  # noqa: ARG002 - an override
        return Reject("not_wanted", Code.FORBIDDEN, Sentence("不", "No"))


@pytest.fixture
def log() -> Iterator[list[Line]]:
    """All log lines of the test."""
    with capture_logs() as lines:
        yield lines  # type: ignore[misc] # they are dicts


def ended(log: list[Line], message_id: str = "m") -> Line:
    """The only line about the end of a message."""
    [line] = [line for line in log if line["event"] == "request ended" and line["message_id"] == message_id]
    return line


async def test_an_answer_is_logged_with_its_times_tokens_and_length(redis_server: RedisServer, log: list[Line]) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("an ")
        await asyncio.sleep(0.05)  # the time that is measured
        call.done("answer", usage={"prompt_tokens": 7, "completion_tokens": 2})
        await worker.idle()
    line = ended(log)
    assert [name for name in line if name in NAMES] == NAMES
    assert (line["user"], line["outcome"], line["reason"], line["backend"]) == (USER, "done", "stop", "played")
    assert (line["node"], line["stream"], line["attempts"], line["continued"]) == ("0", "0", 1, False)
    assert (line["tokens_in"], line["tokens_out"], line["characters"]) == (7, 2, len("an answer"))
    assert 0 <= line["queue_wait_ms"] <= line["first_delta_ms"] <= line["total_ms"] - 45


async def test_a_message_that_waited_for_a_slot_is_logged_with_this_wait(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server, concurrency=1) as worker:
        await worker.ask("first")
        call = await worker.backend.call(1)
        await worker.ask("second")
        await asyncio.sleep(0.1)  # the time that is measured
        call.done("x")
        (await worker.backend.call(2)).done("x")
        await worker.idle()
    assert ended(log, "second")["queue_wait_ms"] >= 95


async def test_the_times_of_a_message_begin_when_it_was_received_and_those_of_a_retry_when_it_was_retried(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask(at=worker.metrics.redis_clock.now() - 60_000)
        (await worker.backend.call(1)).fail(BackendError("http_400", "no", kind="impossible"))
        await retried(worker)
        (await worker.backend.call(2)).done("x")
        await worker.idle()
    failed, done = (line for line in log if line["event"] == "request ended")
    assert 60_000 <= failed["queue_wait_ms"] <= failed["total_ms"] < 70_000
    assert 0 <= done["queue_wait_ms"] <= done["first_delta_ms"] <= done["total_ms"] < 10_000


async def test_a_message_that_failed_is_logged_with_the_reason_and_its_attempts(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server, max_attempts=2) as worker:
        await worker.ask()
        for number in (1, 2):
            call = await worker.backend.call(number)
            call.send("half")
            call.fail(BackendError("broken_stream"))
        await worker.ask("refused")
        (await worker.backend.call(3)).fail(BackendError("http_400", "no", kind="impossible"))
        await worker.idle()
    line = ended(log)
    assert (line["outcome"], line["reason"], line["attempts"]) == ("failed", "broken_stream", 2)
    assert (line["characters"], line["tokens_in"]) == (len("half"), None)
    assert ended(log, "refused")["first_delta_ms"] is None
    assert counts(worker) == (0, 2, 0, 0)


async def test_a_message_that_a_guard_declines_in_the_worker_is_logged_once(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server, guards=GuardChain([_Declines()])) as worker:
        await worker.ask("bad")
        await worker.idle()
    line = ended(log, "bad")
    assert (line["outcome"], line["reason"], line["first_delta_ms"]) == ("failed", "not_wanted", None)


async def test_a_cancelled_answer_is_logged_once(redis_server: RedisServer, log: list[Line]) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        (await worker.backend.call(1)).send("so far")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        await worker.idle()
    line = ended(log)
    assert (line["outcome"], line["characters"], line["attempts"]) == ("cancelled", len("so far"), 1)
    assert line["first_delta_ms"] is not None


async def test_an_answer_that_another_node_cancels_is_logged_once(redis_server: RedisServer, log: list[Line]) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        (await worker.backend.call(1)).send("so far")
        await worker.replies.cancel(USER, "m")  # as another node that takes this one for dead
        await worker.idle()
    assert (ended(log)["outcome"], ended(log)["attempts"]) == ("cancelled", 1)


async def test_a_queued_message_that_was_sent_twice_and_cancelled_is_logged_once(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server, start=False) as worker:
        await worker.ask()
        await worker.ask()
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        worker.start()
        await worker.idle()
    line = ended(log)
    assert (line["outcome"], line["attempts"], line["backend"]) == ("cancelled", 0, None)
    assert (line["queue_wait_ms"], line["first_delta_ms"]) == (None, None)
    assert line["total_ms"] >= 0
    assert counts(worker) == (0, 0, 1, 0)


async def test_a_message_that_is_cancelled_while_it_is_opened_is_logged_once(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s") as worker,
    ):
        await worker.load_scripts()
        opening = proxy.on_answer_to(LUA["open"].digest.encode(), fate=Fate.DELAY, delay=1.0)
        await worker.requests.admit(chat_request(USER, "m"))
        await wait_until(lambda: opening.sprung, "it is being opened")
        await worker.jobs.cancel(USER, "m")
        await worker.idle()
    assert (ended(log)["outcome"], ended(log)["attempts"]) == ("cancelled", 1)


async def test_a_message_that_is_sent_again_is_logged_once(redis_server: RedisServer, log: list[Line]) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        await worker.ask()
        await wait_until(lambda: len(worker.pending()) == 1, "the second request has ended")
        call.done("x")
        await worker.idle()
        await worker.ask()
        await worker.idle()
    assert ended(log)["outcome"] == "done"
    assert counts(worker) == (1, 0, 0, 1)


async def test_a_message_that_another_node_has_ended_and_removed_is_not_logged_here(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server) as worker:
        entry_id = await worker.ask()
        call = await worker.backend.call(1)
        await worker.replies.open(USER, "m", request=worker.requests.request_id(entry_id))
        await worker.replies.append(USER, "m", attempt=2, before=0, after=1, text="x", terminal=Terminal("done"))
        await worker.requests.finish(Entry(entry_id, {"user": str(USER)}))
        call.done("y")
        await worker.idle()
    assert [line for line in log if line["event"] == "request ended"] == []
    assert counts(worker) == (0, 0, 0, 0)


async def test_a_drained_answer_is_logged_by_the_process_that_ends_it(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server) as before:
        received = before.metrics.redis_clock.now() - 5_000
        await before.ask(at=received)
        (await before.backend.call(1)).send("half ")
        await wait_until(lambda: len(before.entries()) == 3, "half of it is recorded")
    assert [line for line in log if line["event"] == "request ended"] == []
    async with run_worker(redis_server, ai_continue="assistant") as worker:
        (await worker.backend.call(1)).done("and half")
        await worker.idle()
    line, record = ended(log), entries(worker)
    assert (line["outcome"], line["attempts"], line["continued"]) == ("done", 2, True)
    assert line["queue_wait_ms"] == next(at for at, one in record if one["event"] == "opened") - received
    assert line["first_delta_ms"] == next(at for at, one in record if one.get("text")) - received
    assert counts(before, worker) == (1, 0, 0, 1)


async def test_an_end_whose_worker_died_is_logged_by_the_next_one_from_the_record(
    redis_server: RedisServer, log: list[Line]
) -> None:
    async with run_worker(redis_server, start=False) as worker:
        request = worker.requests.request_id(await worker.ask())
        await worker.replies.open(USER, "m", request=request)
        terminal = Terminal("done", "stop", {"prompt_tokens": 7, "completion_tokens": 2})
        await worker.replies.append(USER, "m", attempt=1, before=0, after=4, text="text", terminal=terminal)
        worker.start()
        await worker.idle()
    line = ended(log)
    assert (line["outcome"], line["attempts"], line["tokens_in"], line["characters"]) == ("done", 1, 7, 4)
    assert line["backend"] is None
    assert 0 <= line["queue_wait_ms"] <= line["first_delta_ms"] <= line["total_ms"]


def counts(*workers: WorkerHarness) -> tuple[float, ...]:
    """How many messages these workers have counted as done, failed and cancelled, and how many first deltas."""
    names = [("imstream_messages_total", {"outcome": outcome}) for outcome in ("done", "failed", "cancelled")]
    names.append(("imstream_first_delta_seconds_count", {}))
    registries = [worker.metrics.registry for worker in workers]
    return tuple(sum(one.get_sample_value(*name) or 0 for one in registries) for name in names)


def entries(worker: WorkerHarness) -> list[tuple[int, dict[str, str]]]:
    """The record of the message, with the time of each entry."""
    return [(int(at.partition("-")[0]), one) for at, one in worker.redis.xrange(worker.keys.reply(USER, "m"))]
