"""The Python client with a real node. These tests also document the client."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from imstream.client import (
    Accepted,
    BadMessage,
    Busy,
    Cancelled,
    Client,
    Connected,
    ConnectionChange,
    Disconnected,
    Expired,
    Failed,
    Outcome,
    Piece,
    Receipt,
    Reply,
    Restarted,
    Result,
    Turn,
)
from imstream.demo.answer import canned_answer
from imstream.keys import Keys
from imstream.texts import Text
from tests.support.servers import DemoBackend, NodeProcess, RedisServer, start_node
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.terminal import piped
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USER = user_id(10001)
LIMIT = 30.0


@pytest.fixture
def node(redis_server: RedisServer, demo: DemoBackend, tmp_path: Path) -> Iterator[NodeProcess]:
    """A node with limits of three messages, and two per user."""
    settings = {"queue_limit": 3, "user_limit": 2, "retry_wait": "20ms", "drain_grace": "200ms"}
    running = start_node(tmp_path, redis_url=redis_server.url, ai_url=demo.url, settings=settings)
    with running.process:
        yield running


@pytest.fixture
async def proxy(node: NodeProcess) -> AsyncIterator[TcpProxy]:
    """A TCP proxy in front of the node."""
    async with tcp_proxy(node.port) as running:
        yield running


def recorded(server: RedisServer, reply: Reply) -> str:
    """The recorded answer: the texts of the last attempt in the reply stream."""
    with server.client() as redis:
        entries = [fields for _, fields in redis.xrange(Keys().reply(USER, reply.message_id))]
    return "".join(fields.get("text", "") for fields in entries if fields["attempt"] == entries[-1]["attempt"])


async def test_a_conversation(node: NodeProcess, redis_server: RedisServer) -> None:
    async with Client(node.ws(), USER, lang="en") as client:
        reply = await client.send("What is a stream?")
        assert await reply.accepted() == 1
        shown = "".join([piece.text async for piece in reply])
        assert "> What is a stream?" in shown
        assert shown == await reply.text() == recorded(redis_server, reply)
        result = await reply.result()
        assert (result.outcome, result.finish_reason) == (Outcome.DONE, "stop")

        history = [Turn(role="user", content="What is a stream?"), Turn(role="assistant", content=shown)]
        follow_up = await client.send("And a group?", history=history)
        assert "> And a group?" in await follow_up.text()


async def test_a_connection_that_breaks_again_and_again_costs_no_text(
    proxy: TcpProxy, redis_server: RedisServer
) -> None:
    changes: list[ConnectionChange] = []
    async with Client(f"ws://127.0.0.1:{proxy.port}/ws", USER, on_change=changes.append) as client:
        question = "[[demo length=600 pace=5ms]] go on and on"
        eighth = len("".join(canned_answer(question))) // 8
        reply = await client.send(question)
        shown = ""
        async with asyncio.timeout(LIMIT):
            async for piece in reply:
                before, shown = len(shown), shown + piece.text
                if len(shown) // eighth > before // eighth:
                    proxy.drop()
        assert shown == await reply.text() == recorded(redis_server, reply)
        assert (reply.attempt, reply.repeated) == (1, 0)
    assert proxy.accepted >= 3
    resumed = [change.resumed for change in changes if isinstance(change, Connected)]
    assert resumed == [0] + [1] * (proxy.accepted - 1)
    assert sum(isinstance(change, Disconnected) for change in changes) == proxy.accepted - 1


async def test_a_broken_answer_begins_again_and_says_so(node: NodeProcess, redis_server: RedisServer) -> None:
    async with Client(node.ws(), USER) as client:
        reply = await client.send("[[demo break=1 length=40]] hello")
        events = [event async for event in reply.events()]
        assert isinstance(events[0], Accepted)
        assert Restarted(2) in events
        after = events[events.index(Restarted(2)) + 1 :]
        assert isinstance(after[-1], Result)
        shown = "".join(event.text for event in after if isinstance(event, Piece))
        assert shown == after[-1].text == recorded(redis_server, reply)
        assert reply.attempt == 2

        pieces = [piece async for piece in await client.send("[[demo break=1 length=40]] hello")]
        assert sum(piece.restarted for piece in pieces) == 1


async def test_what_cannot_be_answered_says_so_to_a_person(node: NodeProcess) -> None:
    async with Client(node.ws(), USER, lang="en") as client:
        reply = await client.send("[[demo fail=1 status=400]] hello")
        with pytest.raises(Failed, match="refused this message"):
            await reply.text()
        assert (await reply.result()).outcome is Outcome.FAILED


async def test_too_many_messages_are_refused_and_can_be_sent_again_later(
    node: NodeProcess, redis_server: RedisServer
) -> None:
    async with Client(node.ws(), USER, lang="en") as client:
        running = [await client.send("[[demo first=10s]] wait") for _ in range(2)]
        for reply in running:
            await reply.accepted()
        refused = await client.send("one too many", message_id="m3")
        with pytest.raises(Busy, match="Too many of your messages") as caught:
            await refused.text()
        assert caught.value.retry_after is not None
        async with Client(node.ws(), user_id(10002), lang="en") as other:
            third = await other.send("[[demo first=10s]] wait")
            await third.accepted()
            with pytest.raises(Busy, match="Many people are waiting"):
                await (await other.send("the node is full")).accepted()
            await third.cancel()
        await running[0].cancel()
        with redis_server.client() as redis:
            await wait_until(lambda: redis.xlen(Keys().requests("0")) == 1, "the cancelled ones are removed")
        again = await client.send("one too many", message_id="m3")
        assert "> one too many" in await again.text()
        await running[1].cancel()


async def test_an_answer_can_be_cancelled_at_any_time(node: NodeProcess, redis_server: RedisServer) -> None:
    async with Client(node.ws(), USER, lang="en") as client:
        reply = await client.send("[[demo length=1000 pace=10ms]] long")
        await anext(aiter(reply))
        assert await reply.cancel() is Receipt.CANCELLED
        with pytest.raises(Cancelled) as caught:
            await reply.text()
        assert caught.value.text == recorded(redis_server, reply) != ""

        waiting = await client.send("[[demo first=10s]] not begun")
        assert await waiting.cancel() is Receipt.CANCELLED
        assert (await waiting.result()).text == ""

        done = await client.send("[[demo length=3]] short")
        await done.text()
        assert await done.cancel() is Receipt.TOO_LATE
        assert await client.cancel("never-sent") is Receipt.UNKNOWN


async def test_a_message_that_is_sent_twice_is_answered_once(node: NodeProcess, redis_server: RedisServer) -> None:
    async with Client(node.ws(), USER) as client:
        first = await client.send("[[demo length=20]] hello", message_id="m1")
        text = await first.text()
        again = await client.send("[[demo length=20]] hello", message_id="m1")
        assert await again.text() == text
        with redis_server.client() as redis:
            await wait_until(lambda: redis.xlen(Keys().requests("0")) == 0, "the user has no request left")
        other = await client.send("[[demo length=50]] something else", message_id="m1")
        with pytest.raises(BadMessage, match="messageId"):
            await other.text()
        assert again.attempt == 1


async def test_a_node_that_is_killed_and_comes_back_answers_what_it_accepted(
    node: NodeProcess, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with Client(node.ws(), USER) as client:
        reply = await client.send("[[demo length=200 pace=10ms]] hello")
        await anext(aiter(reply))
        node.process.kill()
        unanswered = asyncio.create_task(client.send("[[demo length=3]] sent while nobody listens"))
        back = await asyncio.to_thread(
            start_node, tmp_path, redis_url=redis_server.url, ai_url=demo.url, port=node.port
        )
        with back.process:
            async with asyncio.timeout(LIMIT):
                assert await reply.text() == recorded(redis_server, reply)
                assert reply.attempt == 2
                assert (await (await unanswered).result()).outcome is Outcome.DONE


async def test_a_node_that_is_restarted_hands_over_without_losing_a_word(
    node: NodeProcess, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    changes: list[ConnectionChange] = []
    async with Client(node.ws(), USER, on_change=changes.append) as client:
        reply = await client.send("[[demo length=300 pace=10ms]] hello")
        await anext(aiter(reply))
        node.process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(node.process.wait) == 0
        assert any(change.why == Text.DRAINING.zh for change in changes if isinstance(change, Disconnected))
        back = await asyncio.to_thread(
            start_node, tmp_path, redis_url=redis_server.url, ai_url=demo.url, port=node.port
        )
        with back.process:
            async with asyncio.timeout(LIMIT):
                assert await reply.text() == recorded(redis_server, reply)


async def test_a_reply_that_is_no_longer_kept_is_told_plainly(
    node: NodeProcess, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with Client(node.ws(), USER, lang="en") as client:
        reply = await client.send("[[demo first=10s]] hello")
        await reply.accepted()
        node.process.kill()
        with redis_server.client() as redis:
            redis.flushall()  # the accepted message is lost with Redis' data, and so is its reply
        back = await asyncio.to_thread(
            start_node, tmp_path, redis_url=redis_server.url, ai_url=demo.url, port=node.port
        )
        with back.process:
            async with asyncio.timeout(LIMIT):
                with pytest.raises(Expired, match="please send it again"):
                    await reply.text()


async def test_the_terminal_client_sends_piped_input(node: NodeProcess) -> None:
    code, out, err = await piped(node.ws(), "[[demo break=1 length=20]]\nwhy?\n")
    assert code == 0
    assert out.count("demo backend") == len(out.splitlines()) == 1, (
        "text of the attempt that broke is no part of the answer"
    )
    assert "being generated again" in err
