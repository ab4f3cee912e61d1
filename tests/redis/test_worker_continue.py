"""An answer that broke continues where it was: on this node, on another one, with the same text for every client."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.errors import BackendError, StoreUnavailable
from imstream.model import Terminal
from imstream.store.replies import ReplyStore
from imstream.worker.jobs import UNREAD_ROUNDS
from tests.redis.worker_harness import USER, Follower, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

CONTINUES: dict[str, Any] = {"ai_continue": "assistant"}
BEGINNING, REST = "Once upon ", "a time"


def broken(usage: dict[str, int] | None = None) -> BackendError:
    """The error of an answer that broke."""
    error = BackendError("broken_stream", "the connection was lost within the answer")
    error.usage = usage
    return error


def away() -> BackendError:
    """The error of a backend that is away."""
    return BackendError("connect_failed", "refused", kind="away")


def attempts(worker: WorkerHarness) -> list[tuple[str, str, str]]:
    """The attempts in the record: their number, that for clients, and the text that they continue."""
    opened = [entry for entry in worker.entries() if entry["event"] == "opened"]
    return [(entry["attempt"], entry.get("wire", ""), entry.get("text", "")) for entry in opened]


async def cut_after(worker: WorkerHarness, text: str) -> Follower:
    """Ask, and break the answer after a text; return the client that follows it."""
    client = worker.follow()
    await worker.ask()
    first = await worker.backend.call(1)
    first.send(text)
    first.fail(broken())
    return client


async def recorded(worker: WorkerHarness, text: str) -> None:
    """Wait until this text is recorded."""
    await wait_until(lambda: worker.recorded_text() == text, "the text is recorded")


async def test_a_cut_answer_goes_on_and_its_client_notices_nothing(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **CONTINUES) as worker:
        client = worker.follow()
        await worker.ask()
        first = await worker.backend.call(1)
        first.send(BEGINNING)
        first.fail(broken({"total_tokens": 3}))
        second = await worker.backend.call(2)
        assert second.messages == first.messages
        assert second.written is not None
        assert (second.written.text, second.written.tokens > 0) == (BEGINNING, True)
        second.send("a ")
        second.fail(broken())
        third = await worker.backend.call(3)
        assert third.written is not None
        assert third.written.text == "Once upon a "
        third.done("time", usage={"total_tokens": 4})
        assert await client.end() == "done"
        assert (client.text, client.restarts) == (BEGINNING + REST, 0)
        assert client.terminal == Terminal("done", "stop", {"total_tokens": 7})
        await worker.idle()
        assert worker.recorded() == ("done", BEGINNING + REST)
        assert attempts(worker) == [("1", "", ""), ("2", "1", BEGINNING), ("3", "1", "Once upon a ")]


async def test_an_answer_that_was_cut_before_its_finish_reason_is_complete(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        (await worker.backend.call(2)).done()
        assert await client.end() == "done"
        assert (client.text, client.restarts) == (BEGINNING, 0)
        await worker.idle()


async def test_without_the_option_a_cut_answer_begins_again(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = await cut_after(worker, BEGINNING)
        second = await worker.backend.call(2)
        assert second.written is None
        second.done("all")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("all", 1)
        await worker.idle()


async def test_cuts_use_up_no_attempts_while_the_answer_goes_on_and_the_text_stays_when_none_is_left(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, max_attempts=2, **CONTINUES) as worker:
        client = worker.follow()
        await worker.ask()
        for number, text in enumerate([BEGINNING, "a ", "t", "i", "m", "", ""], 1):
            call = await worker.backend.call(number)
            if text:
                call.send(text)
            call.fail(broken())
        assert await client.end() == "failed"
        assert (client.text, client.restarts) == ("Once upon a tim", 0)
        await worker.idle()
        assert [letter["attempts"] for letter in worker.dead()] == ["7"]
        assert len(worker.backend.calls) == 7


async def test_while_the_backend_is_away_the_answer_waits_with_its_text(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, max_attempts=2, **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        for number in range(2, 6):  # more often than there are attempts
            (await worker.backend.call(number)).fail(away())
        last = await worker.backend.call(6)
        assert last.written is not None
        assert last.written.text == BEGINNING
        last.done(REST)
        assert await client.end() == "done"
        assert (client.text, client.restarts) == (BEGINNING + REST, 0)
        await worker.idle()
        assert [entry["event"] for entry in worker.entries()].count("waiting") == 4
        assert len(attempts(worker)) == 2


@pytest.mark.parametrize("how", ["killed", "drained"])
async def test_the_next_worker_continues_the_record(redis_server: RedisServer, how: str) -> None:
    usage = {"total_tokens": 5}
    async with run_worker(redis_server, flush_interval="1h", **CONTINUES) as worker:
        await worker.ask()
        first = await worker.backend.call(1)
        first.send("Once ")
        first.fail(broken(usage))
        second = await worker.backend.call(2)
        second.send("upon ")
        if how == "killed":
            for number in range(UNREAD_ROUNDS):
                await worker.jobs.flush(number)
            assert worker.recorded_text() == BEGINNING
            second.send("never recorded")
            await worker.crash()
    async with run_worker(redis_server, **CONTINUES) as worker:
        call = await worker.backend.call(1)
        assert call.written is not None
        assert call.written.text == BEGINNING
        # Every position that a client can have.
        clients = [worker.follow(attempt=1, offset=at, text=BEGINNING[:at]) for at in range(len(BEGINNING) + 1)]
        ahead = worker.follow(attempt=1, offset=12, text=f"{BEGINNING}ne")
        late = worker.follow()
        call.done(REST, usage=usage)
        for client in (*clients, ahead, late):
            assert await client.end() == "done"
            assert client.text == BEGINNING + REST
            assert client.terminal is not None
            assert client.terminal.usage == {"total_tokens": 10}
        assert [client.restarts for client in clients] == [0] * len(clients)
        assert (ahead.restarts, late.restarts) == (1, 0)
        await worker.idle()
        assert worker.recorded() == ("done", BEGINNING + REST)
        assert attempts(worker) == [("1", "", ""), ("2", "1", "Once "), ("3", "3", BEGINNING)]


async def test_another_node_shows_its_clients_the_continued_text(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **CONTINUES) as worker:
        await worker.ask()
        first = await worker.backend.call(1)
        first.send(BEGINNING)
        await recorded(worker, BEGINNING)
        async with run_worker(redis_server, node="1", start=False) as other:

            async def read() -> None:
                reply = other.buffers.get(USER, "m")
                record = await other.replies.read(USER, "m", after=reply.position)
                assert record is None or reply.load(record)

            reply = other.buffers.get(USER, "m")
            client = other.follow()
            await read()
            assert client.text == BEGINNING
            first.fail(broken())
            second = await worker.backend.call(2)
            await read()
            assert (reply.attempt, reply.fence) == (1, 2)
            second.done(REST)
            await worker.idle()
            await read()
            assert (client.text, client.restarts) == (BEGINNING + REST, 0)
            assert client.terminal == Terminal("done", "stop")


async def test_a_continuing_answer_is_cancelled_where_it_stands(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        second = await worker.backend.call(2)
        second.send("a")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert await client.end() == "cancelled"
        assert (client.text, client.restarts) == (f"{BEGINNING}a", 0)
        assert second.cancelled
        await worker.idle()
        assert worker.recorded() == ("cancelled", f"{BEGINNING}a")


@pytest.mark.parametrize("kind", ["impossible", "misconfigured"])
async def test_an_answer_whose_continuation_is_refused_begins_again_in_the_same_attempt(
    redis_server: RedisServer, kind: str
) -> None:
    refusal = BackendError("http_400", "the last message must be of the user", kind="impossible")
    refusal.kind = "impossible" if kind == "impossible" else "misconfigured"
    async with run_worker(redis_server, max_attempts=2, ai_breaker_failures=1, **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        with capture_logs() as logs:
            (await worker.backend.call(2)).fail(refusal)
            third = await worker.backend.call(3)
        assert not worker.upstream.gate.is_closed  # it refuses this form of request, and is there
        assert third.written is None
        third.done("all of it")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("all of it", 1)
        await worker.idle()
        assert [line["backend"] for line in logs if line["event"] == "backend refuses to continue an answer"]


async def test_a_continuing_call_that_finds_the_model_unknown_keeps_the_text(redis_server: RedisServer) -> None:
    refusal = BackendError("model_not_found", "no such model", kind="impossible")
    refusal.kind = "misconfigured"
    async with run_worker(redis_server, retry_wait="10ms", retry_wait_max="20ms", **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        (await worker.backend.call(2)).fail(refusal)
        third = await worker.backend.call(3)
        assert third.written is not None
        assert third.written.text == BEGINNING
        third.done(REST)
        assert await client.end() == "done"
        assert (client.text, client.restarts) == (BEGINNING + REST, 0)
        await worker.idle()


async def test_text_that_has_all_its_tokens_ends_there_as_its_backend_reports(redis_server: RedisServer) -> None:
    text = "long " * 60
    async with run_worker(redis_server, answer_tokens=50, **CONTINUES) as worker:
        client = await cut_after(worker, text)
        second = await worker.backend.call(2)
        assert second.written is not None
        assert second.written.tokens > 50
        second.done("and", finish_reason="length")
        assert await client.end() == "done"
        assert (client.text, client.restarts, client.terminal) == (text + "and", 0, Terminal("done", "length"))
        await worker.idle()


async def test_text_with_special_tokens_begins_again(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **CONTINUES) as worker:
        client = await cut_after(worker, "<|im_end|>\n")
        second = await worker.backend.call(2)
        assert second.written is None
        second.done("all of it")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("all of it", 1)
        await worker.idle()
        assert [entry["counted"] for entry in worker.entries() if entry["event"] == "opened"] == ["0", "1", "1"]


async def test_a_text_whose_record_was_lost_is_the_same_for_its_clients_when_it_is_cut_again(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        second = await worker.backend.call(2)
        worker.redis.delete(worker.keys.reply(USER, "m"))
        second.send("a ")
        await recorded(worker, "Once upon a ")
        late = worker.follow(attempt=2, offset=4, text="Once")  # has read the new record
        second.fail(broken())
        (await worker.backend.call(3)).done("time")
        for one in (client, late):
            assert await one.end() == "done"
            assert one.text == BEGINNING + REST
        await worker.idle()
        assert worker.recorded() == ("done", BEGINNING + REST)


async def test_an_opening_whose_answer_is_lost_uses_up_one_attempt(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, lost = ReplyStore.open, list[object]()

    async def open_and_lose(store: ReplyStore, *given: Any, **named: Any) -> Any:  # noqa: ANN401 - as there
        opened = await opens(store, *given, **named)
        if len(lost) < 2:
            lost.append(opened)
            raise StoreUnavailable("no answer in time")
        return opened

    monkeypatch.setattr(ReplyStore, "open", open_and_lose)
    async with run_worker(redis_server, max_attempts=2) as worker:
        client = worker.follow()
        await worker.ask()
        (await worker.backend.call(1)).fail(broken())
        (await worker.backend.call(2)).done("all")
        assert await client.end() == "done"
        await worker.idle()
        assert worker.attempts() == [1, 2]
        assert worker.begun == ["m"]


async def test_text_at_its_limit_is_not_continued(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, max_answer=len(BEGINNING), **CONTINUES) as worker:
        client = await cut_after(worker, BEGINNING)
        second = await worker.backend.call(2)
        assert second.written is None
        second.done("all of it")
        assert await client.end() == "done"
        assert client.text == "all of it"
        await worker.idle()
