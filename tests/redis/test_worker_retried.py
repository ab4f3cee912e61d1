"""A worker answers requests that were made from dead letters."""

from imstream.clock import time_of
from imstream.errors import BackendError
from imstream.model import Terminal
from imstream.redis.client import RedisClient
from imstream.store.dead_letters import DeadLetterOffice, Selection
from imstream.worker.disposition import MAX_EXTRA_ATTEMPTS
from tests.redis.worker_harness import USER, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


async def retried(worker: WorkerHarness) -> None:
    """Retry the only letter."""
    await wait_until(lambda: len(worker.dead()) == 1, "the request is buried")
    settings = worker.settings
    async with RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout) as redis_client:
        office = DeadLetterOffice(redis_client, settings)
        [letter] = [letter async for letter in office.letters("0", Selection())]
        assert await office.retry(letter) == "retried"


async def test_each_retry_is_a_new_admission_with_all_its_attempts_however_many_there_were(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, max_attempts=1) as worker:
        worker.backend.always = lambda call: call.fail(BackendError("http_400", "no", kind="impossible"))
        await worker.ask()
        rounds = MAX_EXTRA_ATTEMPTS + 2
        for _ in range(rounds):
            await retried(worker)
        await wait_until(lambda: len(worker.dead()) == 1, "the request is buried")
        assert (worker.dead()[0]["reason"], worker.dead()[0]["attempts"]) == ("http_400", str(rounds + 1))
        worker.backend.always = lambda call: call.done("at last")
        await retried(worker)
        await worker.idle()
        assert worker.recorded_text() == "at last"
        assert worker.dead() == []
        assert worker.begun == ["m"] * (rounds + 2)
        events = [entry["event"] for entry in worker.entries()]
        assert (events.count("failed"), events.count("reopened"), events.count("done")) == (rounds + 1, rounds + 1, 1)


async def test_a_retried_request_that_was_reopened_by_a_worker_that_died_is_not_reopened_again(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, start=False) as worker:
        await worker.requests.ensure_group()
        await worker.replies.open(USER, "m", request="0/1-0")
        failed = Terminal("failed", reason="http_503")
        await worker.replies.append(USER, "m", attempt=1, before=0, after=4, text="half", terminal=failed)
        letter = {"user": USER, "message_id": "m", "contents": "why?", "reason": "http_503", "attempts": 1}
        worker.redis.xadd(worker.keys.dead("0"), letter)
        await retried(worker)
        [entry] = await worker.requests.read(count=1, block=None)
        await worker.replies.open(USER, "m", request=f"0/{entry.entry_id}", reopens=True)  # and then it died
        worker.backend.always = lambda call: call.done("the answer")
        worker.start()
        await worker.idle()
        events = [(entry["event"], entry["attempt"]) for entry in worker.entries()]
        assert events[-5:] == [("failed", "1"), ("reopened", "2"), ("opened", "2"), ("opened", "3"), ("done", "3")]
        assert worker.recorded_text() == "the answer"
        began = await worker.replies.beginning(USER, "m")
        assert None not in began
        assert began.text_at >= began.opened_at > time_of(entry.entry_id) - 1  # type: ignore[operator] # see before


async def test_dead_letters_are_kept_within_their_bounds_by_the_worker_of_their_node(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, dead_age="1h", dead_bytes=50_000) as worker:
        dead = worker.keys.dead("0")
        worker.redis.xadd(dead, {"user": "1"}, id="1000-0")
        await wait_until(lambda: worker.dead() == [], "the old letter is dropped")
        for number in range(20):
            worker.redis.xadd(dead, {"user": str(number), "contents": "x" * 10_000})
        await wait_until(lambda: len(worker.dead()) < 5, "those that are too many are dropped")
        assert worker.dead()[-1]["user"] == "19"
        worker.redis.set(worker.keys.dead("0"), "written by hand")
        worker.backend.always = lambda call: call.done("answered all the same")
        await worker.ask()
        await worker.idle()
        worker.redis.delete(worker.keys.dead("0"))
