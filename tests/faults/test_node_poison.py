"""A message that kills its worker each time is buried; all other messages are answered."""

from pathlib import Path

from imstream.demo.answer import canned_answer
from imstream.keys import GROUP, Keys
from imstream.model import ChatRequest
from imstream.texts import Text
from imstream.worker.disposition import WORKER_DIED
from tests.support.crashing_node import POISON
from tests.support.one_node import OneNode, one_node
from tests.support.peer import Told
from tests.support.scripted_backend import refuses, scripted_backend
from tests.support.servers import DemoBackend, RedisServer
from tests.support.waiting import wait_until

POISONER = 10001
INNOCENTS = {10002 + n: f"an innocent question, number {n} [[demo length=60 pace=5ms]]" for n in range(3)}


async def test_a_message_that_kills_its_worker_is_given_up_and_the_others_are_answered(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url, crash_at="called", max_deliveries=3) as node:
        for user, question in INNOCENTS.items():
            async with node.peer(user) as someone:
                assert (await someone.chat(user, question, "m1"))["event"] == "accepted"
        async with node.kept_alive(crash_at="called") as deaths:
            async with node.peer(POISONER) as poisoner:
                await poisoner.send_frame("CHAT", userId=POISONER, contents=f"please {POISON}", messageId="p1")
                assert await poisoner.closed() == 1006
            await wait_until(node.dead, "the message is buried", limit=40)
        assert deaths == [-9] * 3  # delivered exactly MAX_DELIVERIES times

        async with node.peer(POISONER, resume={"p1": Told()}, lang="en") as poisoner:
            failed = (await poisoner.end_of("p1")).terminal
        assert failed is not None
        assert (failed["event"], failed["code"], failed["contents"]) == ("failed", "AI_FAILED", Text.FAILED.en)
        for user, question in INNOCENTS.items():
            async with node.peer(user) as someone:
                await someone.chat(user, question, "m1")
                assert (await someone.end_of("m1")).text == "".join(canned_answer(question))
        await node.settled()

        [letter] = node.dead()
        assert (letter["message_id"], letter["reason"]) == ("p1", WORKER_DIED)
        assert letter["contents"] == f"please {POISON}"
        for user in INNOCENTS:
            assert node.recorded(user, "m1")[0] == "done"


async def test_a_failure_whose_worker_dies_before_the_burial_is_buried_by_the_next(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=refuses(400, '{"error": {"message": "no such thing"}}')) as backend,
        one_node(tmp_path, redis_server, backend.url, crash_at="burying") as node,
    ):
        async with node.peer(POISONER) as someone:
            await someone.chat(POISONER, "hello", "m1")
            assert await node.died() == -9
        await node.start()
        async with node.peer(POISONER) as someone:
            await someone.chat(POISONER, "hello", "m1")
            assert (await someone.end_of("m1")).events[-1] == "failed"
        await node.settled()
        [letter] = node.dead()
        assert letter["reason"] == "http_400"
        assert node.recorded(POISONER, "m1") == ("failed", "")
        assert len(backend.requests) == 1


def _died_with(node: OneNode, user: int, contents: str, deliveries: int) -> None:
    """Add a pending request with this number of deliveries to the stream."""
    stream = Keys().requests("0")
    fields = ChatRequest(user, "m1", contents, (), "en", 0, "trace").fields()
    entry = node.redis.xadd(stream, dict(zip(fields[::2], fields[1::2], strict=True)))
    node.redis.xreadgroup(GROUP, "0", {stream: ">"}, count=1)
    node.redis.xclaim(stream, GROUP, "0", 0, [entry], retrycount=deliveries, justid=True)


async def test_no_burial_waits_for_a_suspect_that_takes_long(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url, max_deliveries=3) as node:
        await node.killed()
        _died_with(node, 10002, "takes long [[demo first=20s]]", deliveries=2)
        for user in range(10003, 10013):
            _died_with(node, user, f"please {POISON}", deliveries=3)
        await node.start()
        await wait_until(lambda: len(node.dead()) == 10, "all are buried", limit=8)
        assert node.unfinished() == 1  # the suspect is still being answered, or not started
        assert {letter["reason"] for letter in node.dead()} == {WORKER_DIED}
        async with node.peer(10002) as someone:
            await someone.send_frame("CANCEL", messageId="m1")
            await someone.until(event="cancelled")
        await node.settled()
