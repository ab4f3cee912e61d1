"""Entries written by another release or by hand: answered if possible, refused, or left to a newer release."""

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from imstream.keys import GROUP
from imstream.model import NEWEST_VERSION, SCHEMA_VERSION, ChatRequest, MalformedEntry
from tests.redis.conftest import chat_request
from tests.redis.worker_harness import USER, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

TOO_NEW = "requests of a newer release are left to a node that knows it"
ON_SERVERS = ["valkey"]

REQUIRED = {"user": str(USER), "message_id": "m", "contents": "hello"}


def add(worker: WorkerHarness, fields: dict[str, str], node: str = "0") -> str:
    """Put an entry into the stream by hand."""
    return str(worker.redis.xadd(worker.keys.requests(node), fields))


def newer(message_id: str) -> dict[str, str]:
    """A request of a future release, with other fields."""
    return {"v": str(NEWEST_VERSION + 1), "sender": str(USER), "id": message_id}


def said_about_newer(logs: list[EventDict]) -> list[EventDict]:
    return [line for line in logs if line["event"] == TOO_NEW]


async def test_a_request_without_optional_fields_is_answered(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        worker.backend.always = lambda call: call.done("x")
        entry_id = add(worker, {**REQUIRED, "colour": "green"})
        await wait_until(lambda: worker.backend.calls, "the AI is asked")
        await worker.idle()
        assert worker.recorded() == ("done", "x")
        assert [message.content for message in worker.backend.calls[0].messages] == ["hello"]
        request = ChatRequest.from_fields(REQUIRED, entry_id)
        assert (request.history, request.lang, str(request.at)) == ((), "zh", entry_id.partition("-")[0])
        assert request.trace


WRONG = {
    "without contents": {"user": str(USER), "message_id": "m"},
    "history that is no JSON": {**REQUIRED, "history": "what was said"},
    "history of something else": {**REQUIRED, "history": '[["user", "hi"]]'},
    "history of numbers": {**REQUIRED, "history": '[{"role": "user", "content": 7}]'},
    "an invalid time": {**REQUIRED, "at": "yesterday"},
    "a time beyond all calendars": {**REQUIRED, "at": "9" * 20},
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_request_that_cannot_be_answered_ends_with_failed_and_is_kept_whole(
    what: str, redis_server: RedisServer
) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        add(worker, {**WRONG[what], "colour": "green", "v": "1"})
        assert await client.end() == "failed"
        await worker.idle()
        assert worker.recorded() == ("failed", "")
        [letter] = worker.dead()
        assert letter["reason"] == "malformed"
        assert WRONG[what].items() <= letter.items()
        assert letter["colour"] == "green"
        assert worker.backend.calls == []


UNADDRESSED = {
    "without user": {name: value for name, value in REQUIRED.items() if name != "user"},
    "without message id": {name: value for name, value in REQUIRED.items() if name != "message_id"},
    "a message id that is no JSON text": {**REQUIRED, "message_id": 'm",\n'},
    "a user that is written as no client writes it": {**REQUIRED, "user": "1_0001"},
    "a message id that is too long": {**REQUIRED, "message_id": "m" * 65},
}


@pytest.mark.parametrize("what", UNADDRESSED)
async def test_a_request_without_a_user_is_buried_and_harms_no_other(what: str, redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        worker.backend.always = lambda call: call.done("x")
        add(worker, UNADDRESSED[what])
        await worker.ask("other")
        await worker.idle()
        assert [letter["reason"] for letter in worker.dead()] == ["malformed"]
        assert worker.recorded("other") == ("done", "x")


async def test_requests_of_a_newer_release_stay_pending_with_one_error_and_the_others_are_answered(
    redis_server: RedisServer,
) -> None:
    ids = set[str]()
    with capture_logs() as logs:
        for _ in range(2):  # by the next process, too
            async with run_worker(redis_server, max_deliveries=1) as worker:
                worker.backend.always = lambda call: call.done("x")
                if worker.redis.xlen(worker.keys.requests("0")) == 0:
                    ids |= {add(worker, newer("new 1")), add(worker, newer("new 2"))}
                await worker.ask("old")
                await wait_until(lambda s=worker: s.entries("old")[-1]["event"] == "done", "the old one is answered")
                await wait_until(lambda s=worker: len(s.pending()) == 2, "the old one has ended")
                sweeps = int(worker.redis.info("commandstats")["cmdstat_xpending"]["calls"])
                await wait_until(
                    lambda s=worker, n=sweeps: s.redis.info("commandstats")["cmdstat_xpending"]["calls"] > n + 4,
                    "it is swept again",
                )
                assert worker.pending() == dict.fromkeys(ids, 0), "no worker has died with them"
                assert worker.recorded("old") == ("done", "x")
                assert worker.dead() == []
                worker.redis.delete(worker.keys.reply(USER, "old"))
    assert [(line["log_level"], line["version"]) for line in said_about_newer(logs)] == [
        ("error", NEWEST_VERSION + 1)
    ] * 2


async def test_an_adopter_leaves_requests_of_a_newer_release_to_their_node_or_to_one_that_supports_them(
    redis_server: RedisServer,
) -> None:
    with capture_logs() as logs:
        async with run_worker(redis_server, lease="300ms") as dying:
            await dying.ask("old")
            await dying.backend.call(1)
            await dying.crash()
            entry_id = add(dying, newer("new"))
        async with run_worker(redis_server, node="1", lease="300ms") as other:
            (await other.backend.call(1)).done("x")
            await wait_until(lambda: other.pending() == {entry_id: 0}, "only the newer one is left")
            await wait_until(lambda: not other.redis.exists(other.keys.adopter("0")), "another node may adopt")
            await wait_until(lambda: other.adopter.adopted == [], "the stream is released")
            [row] = other.redis.xpending_range(other.keys.requests("0"), GROUP, "-", "+", 10)
            assert row["consumer"] == "0"
            assert other.recorded("old") == ("done", "x")
            looks = int(other.redis.info("commandstats")["cmdstat_pttl"]["calls"])
            await wait_until(
                lambda: other.redis.info("commandstats")["cmdstat_pttl"]["calls"] > looks + 4, "it looks again"
            )
            assert not other.redis.exists(other.keys.adopter("0"))
    assert len(said_about_newer(logs)) == 1


async def test_entries_of_this_release_carry_its_version(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.replies.mark_queued(USER, "m")
        await worker.ask()
        call = await worker.backend.call(1)
        [(_, fields)] = worker.redis.xrange(worker.keys.requests("0"))
        assert fields["v"] == str(SCHEMA_VERSION)
        call.send("some text")
        await wait_until(lambda: len(worker.entries()) == 3, "it is recorded")
        await worker.jobs.cancel(USER, "m")
        await worker.idle()
        assert [(one["event"], one["v"]) for one in worker.entries()] == [
            (event, str(SCHEMA_VERSION)) for event in ("queued", "opened", "text", "cancelled")
        ]


async def test_events_of_a_newer_release_in_a_record_are_passed_over(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("some ")
        await wait_until(lambda: len(worker.entries()) == 3, "it is recorded")
        worker.redis.xadd(
            worker.keys.reply(USER, "m"),
            {"attempt": "1", "event": "thinking", "offset": "5", "v": "2", "text": "hm", "mood": "good"},
        )
        call.done("text")
        await worker.idle()
        record = await worker.replies.read(USER, "m")
        assert record is not None
        assert record.text == "some text"


def test_unreadable_fields_of_a_request_do_not_hide_its_user() -> None:
    fields = dict(zip(*[iter(chat_request(USER, "m").fields())] * 2, strict=True))
    with pytest.raises(MalformedEntry) as caught:
        ChatRequest.from_fields({**fields, "history": "{"})
    assert caught.value.partial is not None
    assert (caught.value.partial.user_id, caught.value.partial.lang) == (USER, "zh")
    with pytest.raises(MalformedEntry) as caught:
        ChatRequest.from_fields({**fields, "user": "9" * 5000})
    assert caught.value.partial is None
