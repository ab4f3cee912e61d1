"""A worker that an operator has paused: it starts nothing, and requests that wait for a backend do not fail."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.clock import now_ms
from imstream.errors import BackendError, StoreRefused
from imstream.guards.chain import GuardChain
from imstream.guards.guard import ALLOW, Allow, Guard
from imstream.model import ChatRequest, Waiting
from imstream.store.pauses import ALL, Pause
from imstream.store.requests import Entry, PendingEntry, RequestStream
from tests.redis.worker_harness import USER, PlayedBackend, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


def away() -> BackendError:
    return BackendError("connect_failed", "refused by http://ai/v1", kind="away")


async def pause(worker: WorkerHarness, node: str = ALL) -> None:
    """Pause it as an operator, and wait until it has read it."""
    await worker.pauses.pause(node, reason="new weights", by="ann", refuses=False)
    await wait_until(lambda: worker.jobs.line.reason == "paused", "the worker is paused")


async def is_handed_back(worker: WorkerHarness) -> None:
    await wait_until(lambda: len(worker.jobs) == 0, "the request is handed back")


SLOW: dict[str, Any] = {"retry_wait": "1h", "retry_wait_max": "1h", "retry_window": "1h"}
"""A message that waits for its backend makes no second call within a test."""


async def test_a_running_call_continues_and_later_messages_wait(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        first, second = worker.follow("1st"), worker.follow("2nd")
        await worker.ask("1st")
        call = await worker.backend.call(1)
        await pause(worker, "0")
        await worker.ask("2nd")
        call.done("finished")
        assert await first.end() == "done"
        await wait_until(lambda: worker.redis.xlen(worker.requests.key) == 1, "the first is removed")
        await asyncio.sleep(5 * worker.settings.read_block.total_seconds())  # several rounds of the consumer
        assert len(worker.backend.calls) == 1
        assert await worker.pauses.resume("0")
        (await worker.backend.call(2)).done("now")
        assert await second.end() == "done"
        await worker.idle()


async def test_a_message_that_waits_for_its_backend_does_not_fail_during_a_pause(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SLOW) as worker:
        client = worker.follow()
        await worker.ask()
        worker.backend.always = lambda call: call.fail(away())
        await wait_until(lambda: worker.entries()[-1]["event"] == "waiting", "it is recorded that it waits")
        await pause(worker)
        await is_handed_back(worker)
        made = len(worker.backend.calls)
        await asyncio.sleep(5 * worker.settings.read_block.total_seconds())  # several rounds of the consumer
        # Without a job, no retry window can end.
        assert (len(worker.jobs), len(worker.backend.calls), len(worker.pending())) == (0, made, 1)
        worker.backend.always = lambda call: call.done("at last")
        await worker.pauses.resume(ALL)
        assert await client.end() == "done"
        assert client.text == "at last"
        await worker.idle()
        assert worker.dead() == []
        assert [entry["attempt"] for entry in worker.entries()][-1] == "2"


async def test_a_pause_forgets_no_death_of_a_worker(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SLOW) as worker:
        entry_id = await worker.ask()
        await worker.backend.call(1)
        await worker.crash()
    async with run_worker(redis_server, **SLOW) as worker:
        worker.backend.always = lambda call: call.fail(away())
        for _ in range(2):
            await wait_until(lambda: worker.entries()[-1].get("reason") == "connect_failed", "it waits")
            assert worker.pending() == {entry_id: 2}
            await pause(worker)
            await is_handed_back(worker)
            assert worker.pending() == {entry_id: 1}
            await worker.pauses.resume(ALL)
            await wait_until(lambda: worker.jobs.line.reason != "paused", "the pause has ended")
        await worker.stop()
        assert worker.pending() == {entry_id: 1}
    async with run_worker(redis_server, **SLOW) as worker:
        call = await worker.backend.call(1)
        assert worker.pending() == {entry_id: 2}
        call.done("at last")
        await worker.idle()


@pytest.mark.parametrize("failure", [away(), BackendError("broken_stream", "cut")])
@pytest.mark.parametrize("others", [0, 1])
async def test_a_call_that_fails_during_a_pause_is_made_again_after_it_even_if_it_was_the_last_attempt(
    redis_server: RedisServer, failure: BackendError, others: int
) -> None:
    other = [PlayedBackend("other")] * others
    async with run_worker(redis_server, others=other, max_attempts=1, ai_breaker_failures=99) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        if failure.kind != "away":
            call.send("half of")
        await pause(worker)
        call.fail(failure)
        await is_handed_back(worker)
        assert (len(worker.backend.calls), [one.calls for one in other]) == (1, [[]] * others)
        record = await worker.replies.read(USER, "m")
        assert record is not None
        assert record.waiting == Waiting("played", "paused"), "clients on all nodes are told why"
        for one in (worker.backend, *other):
            one.always = lambda call: call.done("the whole")
        await worker.pauses.resume(ALL)
        assert await client.end() == "done"
        assert client.text == "the whole"
        await worker.idle()


@dataclass
class _Slow(Guard):
    """Takes its time over a message."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def check_ai_call(self, _request: ChatRequest) -> Allow:
        self.asked.set()
        await self.answered.wait()
        return ALLOW


async def test_a_call_that_a_guard_holds_up_until_the_pause_is_not_made(redis_server: RedisServer) -> None:
    guard = _Slow()
    async with run_worker(redis_server, guards=GuardChain([guard])) as worker:
        await worker.ask()
        await asyncio.wait_for(guard.asked.wait(), 30)
        await pause(worker)
        guard.answered.set()
        await is_handed_back(worker)
        assert worker.backend.calls == []
        await worker.pauses.resume(ALL)
        (await worker.backend.call(1)).done("now")
        await worker.idle()


async def test_a_continuation_that_is_refused_during_a_pause_begins_again_after_it(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, ai_continue="assistant") as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("half of ")
        call.fail(BackendError("broken_stream", "cut"))
        call = await worker.backend.call(2)
        await pause(worker)
        call.fail(BackendError("http_400", "the last message must be of the user", kind="impossible"))
        await is_handed_back(worker)
        assert (len(worker.backend.calls), client.text, client.restarts) == (2, "half of ", 0)
        await worker.pauses.resume(ALL)
        (await worker.backend.call(3)).done("it")
        assert await client.end() == "done"
        await worker.idle()


@pytest.mark.parametrize("lost", ["by the pause", "before the pause"])
async def test_after_a_pause_the_retry_window_begins_again(redis_server: RedisServer, lost: str) -> None:
    """A message is handed back by the pause, or its worker has died before: no worker takes it during the pause."""
    brief = SLOW | {"retry_window": "2s", "max_attempts": 1}  # the pause is to be read before its end

    async with run_worker(redis_server, **brief) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(away())
        await wait_until(lambda: worker.entries()[-1]["event"] == "waiting", "it waits")
        begun = int(worker.entries()[-1]["since"])
        if lost == "by the pause":
            await pause(worker)
            await is_handed_back(worker)
        await worker.crash()
        if lost == "by the pause":
            assert await worker.pauses.resume(ALL)
        else:
            await worker.pauses.pause(ALL, reason="new weights", by="ann", refuses=False)
    await wait_until(lambda: now_ms() - begun > 2100, "the first window is over")
    async with run_worker(redis_server, **brief) as again:
        if lost == "before the pause":
            await wait_until(lambda: again.jobs.line.reason == "paused", "it knows the pause")
            await again.pauses.resume(ALL)
        (await again.backend.call(1)).fail(away())
        await wait_until(lambda: again.entries()[-1]["event"] in {"waiting", "failed"}, "it is decided")
        assert again.entries()[-1]["event"] == "waiting"
        assert int(again.entries()[-1]["since"]) > begun + 2000
        assert again.entries()[-1]["attempt"] == "2"
        await again.crash()


async def test_after_a_short_pause_requests_begin_at_once(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, sweep_interval="1h", **SLOW) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(away())
        await wait_until(lambda: worker.entries()[-1]["event"] == "waiting", "it waits")
        await pause(worker)
        await is_handed_back(worker)
        await worker.pauses.resume(ALL)
        (await worker.backend.call(2)).done("now")
        await worker.idle()


async def test_the_requests_that_a_paused_node_has_adopted_are_answered_by_others(redis_server: RedisServer) -> None:
    limits = {"lease": "1s", **SLOW}
    async with run_worker(redis_server, **limits) as dying, run_worker(redis_server, node="1", **limits) as adopter:
        adopter.backend.always = lambda call: call.fail(away())
        await dying.ask()
        await dying.backend.call(1)
        await dying.crash()
        await wait_until(lambda: dying.entries()[-1]["event"] == "waiting", "the adopter has tried to answer it")
        await pause(adopter, "1")
        await wait_until(lambda: not dying.redis.exists(dying.keys.adopter("0")), "it is not adopted any longer")
        async with run_worker(redis_server, node="2", **limits) as other:
            (await other.backend.call(1)).done("by the third")
            await other.idle()
            assert other.recorded() == ("done", "by the third")
        await adopter.pauses.resume("1")


async def test_a_request_that_is_handed_back_while_the_pending_ones_are_read_is_answered_by_others(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node that has adopted it is paused, and ends the adoption in the moment in which the job ends."""
    hand_back, pending, is_read = RequestStream.hand_back, RequestStream.pending, asyncio.Event()

    async def hand_back_then(stream: RequestStream, entry: Entry, *, to: str | None = None) -> None:
        await is_read.wait()
        await hand_back(stream, entry, to=to)

    async def read_first(
        stream: RequestStream, consumer: str | None = None, *, exclude: Iterable[str] = ()
    ) -> list[PendingEntry]:
        found = await pending(stream, consumer, exclude=exclude)
        if not stream.is_own and exclude and not is_read.is_set():
            is_read.set()
            await is_handed_back(adopter)
        return found

    limits = {"lease": "1s", "sweep_interval": "1h", **SLOW}
    async with run_worker(redis_server, **limits) as dying, run_worker(redis_server, node="1", **limits) as adopter:
        adopter.backend.always = lambda call: call.fail(away())
        await dying.ask()
        await dying.backend.call(1)
        await dying.crash()
        await wait_until(lambda: dying.entries()[-1]["event"] == "waiting", "the adopter has tried to answer it")
        monkeypatch.setattr(RequestStream, "hand_back", hand_back_then)
        monkeypatch.setattr(RequestStream, "pending", read_first)
        await pause(adopter, "1")
        await wait_until(lambda: not dying.redis.exists(dying.keys.adopter("0")), "it is not adopted any longer")
        async with run_worker(redis_server, node="2", **limits) as other:
            (await other.backend.call(1)).done("by the third")
            await other.idle()
        await adopter.pauses.resume("1")


async def test_each_time_that_pauses_cannot_be_read_is_logged_once(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        with capture_logs() as logs:
            for number in (1, 2):
                await pause(worker)
                worker.redis.delete(worker.keys.paused())
                worker.redis.set(worker.keys.paused(), "text")
                told = {"event": "pauses cannot be read"}
                await wait_until(lambda: sum(told.items() <= one.items() for one in logs) == number, "it is logged")  # noqa: B023 - awaited here
                worker.redis.delete(worker.keys.paused())
                await wait_until(lambda: worker.jobs.line.reason is None, "it is mended")


async def test_the_reply_of_a_request_that_is_handed_back_outlasts_the_pause(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, reply_ttl="1m", queued_ttl="1h") as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("half of")
        await pause(worker)
        call.fail(BackendError("broken_stream", "cut"))
        await wait_until(lambda: len(worker.jobs) == 0, "the request is handed back")
        kept = worker.redis.pttl(worker.keys.reply(USER, "m"))
        assert kept > 60_000, "clients can resume it, and no number of an attempt is given twice"
        await worker.pauses.resume(ALL)
        (await worker.backend.call(2)).done("the whole")
        await worker.idle()
        assert worker.recorded() == ("done", "the whole")
        assert worker.redis.pttl(worker.keys.reply(USER, "m")) <= 60_000


async def test_a_worker_that_starts_during_a_pause_starts_nothing(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.stop()
        worker.redis.hset(worker.keys.paused(), ALL, "by hand: no JSON")
        await worker.ask()
    async with run_worker(redis_server) as again:
        await wait_until(lambda: again.jobs.line.reason == "paused", "it knows the pause")
        assert again.pauses.of("any") == Pause("by hand: no JSON")
        assert again.backend.calls == []
        again.redis.delete(again.keys.paused())
        (await again.backend.call(1)).done("now")
        await again.idle()


async def test_a_key_of_another_type_pauses_nothing_and_ends_no_pause(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        worker.redis.set(worker.keys.paused(), "text")
        assert worker.pauses.of("0") is not None  # not known yet
        with pytest.raises(StoreRefused):
            await worker.pauses.read()
        assert worker.pauses.of("0") is None
        worker.redis.delete(worker.keys.paused())
        worker.redis.hset(worker.keys.paused(), "0", '{"reason": 7, "at": "x", "refuses": 1, "more": true}')
        assert (await worker.pauses.read()) == {"0": Pause()}
        assert Pause().about == "no reason given"
        worker.redis.set(worker.keys.paused(), "text")
        with pytest.raises(StoreRefused):
            await worker.pauses.read()
        assert (worker.pauses.of("0"), worker.pauses.of("1")) == (Pause(), Pause())  # this node reads both
        worker.redis.delete(worker.keys.paused())
