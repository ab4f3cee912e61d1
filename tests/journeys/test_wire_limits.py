"""Limits on what a client may send and on the number of sockets: the client is notified, others are not affected."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from statistics import median

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from imstream.client import Client, ConnectionChange, Disconnected, Timing
from imstream.gateway.websocket_protocol import PIECE
from imstream.texts import Text
from imstream.user_ids import UserId
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Peer, peer
from tests.support.raw_socket import BINARY, CONTINUATION, PING, PONG, TEXT, frame, raw_user
from tests.support.servers import DemoBackend
from tests.support.users import user_id
from tests.support.waiting import SLOW, wait_until

USER, OTHER = user_id(10001), user_id(10002)
RATE, BURST = 400, 100
CHATS, EACH, ALL = 5, 3, 6

AT_ONCE = "[[demo first=0 length=1]]"
HEARTBEAT = json.dumps({"msgType": "HEARTBEAT"}).encode()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node with small limits."""
    limits = {
        "frame_rate": RATE,
        "frame_burst": BURST,
        "chats_per_minute": CHATS,
        "user_sockets": EACH,
        "node_sockets": ALL,
        "max_depth": 5,
        "max_history": 3,
        "heartbeat": "7s",
    }
    with standing_node(tmp_path_factory.mktemp("limits"), demo.url, **limits) as node:
        yield node


@asynccontextmanager
async def many_sockets(node: OneNode, *users: UserId) -> AsyncIterator[list[Peer]]:
    """Sockets of these users, logged in, and no others: a flooder's disconnect is noticed when its throttling ends."""
    await wait_until(lambda: node.sessions() == 0, "no other session is open")
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(node.peer(user)) for user in users]


async def test_the_login_says_how_often_the_node_wants_to_hear_of_the_client(node: OneNode) -> None:
    async with peer(node.now.ws(USER)) as someone:
        assert (await someone.login(USER))["heartbeatMs"] == 7_000


# Messages per minute


async def test_who_asks_too_much_is_told_when_to_ask_again_on_any_socket(node: OneNode) -> None:
    user = user_id(10101)
    async with node.peer(user) as someone:
        for n in range(CHATS):
            assert (await someone.chat(user, AT_ONCE, f"m{n}"))["event"] == "accepted"
            await someone.end_of(f"m{n}")
    async with node.peer(user, lang="en") as someone:
        told = await someone.chat(user, AT_ONCE, "m-more")
        assert (told["msgType"], told["code"], told["messageId"]) == ("SYSTEM", "RATE_LIMITED", "m-more")
        assert "too many messages" in told["contents"]
        assert 0 < told["retryAfterMs"] <= 60_000 / CHATS
        await someone.send("PING")  # other frames are not limited
        assert (await someone.frame())["msgType"] == "HEARTBEAT"
    async with node.peer(OTHER) as another:
        assert (await another.chat(OTHER, AT_ONCE, "m1"))["event"] == "accepted"
        await another.end_of("m1")
    assert node.record(user, "m-more") == []
    await wait_until(lambda: node.logged("messages refused because of load", rate_limited=1, users=1), "it is counted")


# Frames per second

FRAMES = {
    "heartbeats": frame(TEXT, HEARTBEAT),
    "bare pings": frame(TEXT, b"PING"),
    "no JSON": frame(TEXT, b"{"),
    "binary": frame(BINARY, b"x"),
    "pings": frame(PING),
    "pongs": frame(PONG),
    "empty fragments": frame(TEXT, b"", first=0) + frame(CONTINUATION, first=0) * 8 + frame(CONTINUATION, HEARTBEAT),
}


@pytest.mark.parametrize("what", FRAMES)
async def test_who_sends_too_fast_is_told_once_a_second_and_all_that_was_sent_is_taken_by_and_by(
    what: str, node: OneNode
) -> None:
    one = FRAMES[what]
    frames = 10 if what == "empty fragments" else 1
    async with raw_user(node.port, USER) as flooder:
        began = time.monotonic()
        await flooder.send(one * (3 * RATE // frames))
        await flooder.send_frame(msgType="CHAT", userId=USER, contents="still there?", messageId="last", history="none")
        await flooder.until(code="BAD_REQUEST", contents="消息格式有误: history: Input should be a valid list")
        took = time.monotonic() - began
    slow = [told for told in flooder.texts if told["code"] == "RATE_LIMITED"]
    assert 1 <= len(slow) <= took + 1
    assert all(0 < told["retryAfterMs"] <= 1_000 and "messageId" not in told for told in slow)
    # Tokens refill meanwhile; the burst and the last piece that was read are not waited for.
    assert took > (3 * RATE - BURST - PIECE // len(one) * frames) / RATE * 0.9
    if what in {"heartbeats", "bare pings"}:
        assert sum(told["msgType"] == "HEARTBEAT" for told in flooder.texts) == 3 * RATE


async def test_a_large_message_counts_as_several_frames(node: OneNode) -> None:
    large = frame(TEXT, b'{"msgType":"HEARTBEAT","x":"' + b"x" * 60_000 + b'"}')  # 15 times 4 KiB
    async with raw_user(node.port, USER) as someone:
        began = time.monotonic()
        await someone.send(large * 12 + frame(TEXT, b'{"msgType":"CANCEL","messageId":"last"}'))
        await someone.until(code="UNKNOWN")
        assert time.monotonic() - began > (12 * 15 - BURST) / RATE * 0.9
    assert "RATE_LIMITED" in [told["code"] for told in someone.texts]


async def test_resuming_many_messages_is_throttled_as_that_many_frames(node: OneNode) -> None:
    resume = [{"messageId": f"m{n}"} for n in range(64)]
    async with raw_user(node.port, USER) as someone:
        began = time.monotonic()
        for n in range(4):
            await someone.send_frame(msgType="INIT", userId=USER, resume=[*resume[1:], {"messageId": f"last-{n}"}])
            await someone.until(code="EXPIRED", messageId=f"last-{n}")
        await someone.send(frame(TEXT, b"PING"))
        await someone.until(msgType="HEARTBEAT")
        assert time.monotonic() - began > (4 * 64 - BURST) / RATE * 0.9


async def test_resuming_long_answers_is_throttled_by_their_length(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        await someone.chat(USER, "tell me all [[demo first=0 pace=0 length=40000]]", "long")
        told = await someone.end_of("long")
    frames = 3 * (1 + len(told.text) / 4096)
    login = frame(TEXT, json.dumps({"msgType": "INIT", "userId": USER, "resume": [{"messageId": "long"}]}).encode())
    async with raw_user(node.port, USER) as someone:
        began = time.monotonic()
        for _ in range(3):
            await someone.send(login)
            await someone.until(messageId="long", event="done")
        for _ in range(2):  # the first may be read before the last INIT is charged
            await someone.send(frame(TEXT, b"PING"))
            await someone.until(msgType="HEARTBEAT")
        assert frames > BURST
        assert time.monotonic() - began > (frames - BURST) / RATE * 0.9


async def test_a_client_that_sends_a_message_again_is_throttled_by_the_length_of_its_answer(node: OneNode) -> None:
    question = "tell me all [[demo first=0 pace=0 length=40000]]"
    async with node.peer(USER) as someone:
        await someone.chat(USER, question, "long-again")
        told = await someone.end_of("long-again")
    frames = 3 * len(told.text) / 4096
    again = {"msgType": "CHAT", "userId": USER, "messageId": "long-again", "contents": question}
    async with raw_user(node.port, USER) as someone:
        began = time.monotonic()
        for _ in range(3):
            await someone.send(frame(TEXT, json.dumps(again).encode()))
            await someone.until(messageId="long-again", event="done")
        for _ in range(2):  # the first may be read before the last answer is charged
            await someone.send(frame(TEXT, b"PING"))
            await someone.until(msgType="HEARTBEAT")
        assert frames > BURST
        assert time.monotonic() - began > (frames - BURST) / RATE * 0.9


async def test_flooders_cost_others_no_time(node: OneNode) -> None:
    async with node.peer(OTHER) as healthy, AsyncExitStack() as stack:

        async def typical_beat() -> float:
            took, end = list[float](), time.monotonic() + 1
            while (began := time.monotonic()) < end:
                await healthy.send("PING")
                await healthy.frame()
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.02)  # the pace of the healthy client
            return median(took)  # one may wait for a process that had no CPU

        before = await typical_beat()
        flooders = [await stack.enter_async_context(raw_user(node.port, user_id(10401 + n))) for n in range(ALL - 1)]
        pings = frame(PING) * 100_000
        flooding = [asyncio.create_task(one.send(pings, limit=60)) for one in flooders]
        beside = await typical_beat()
        for task in flooding:
            task.cancel()
        await asyncio.wait(flooding)
        assert beside < before + 0.5 * SLOW


async def test_who_keeps_to_the_pace_is_never_told_anything(node: OneNode) -> None:
    async with many_sockets(node, USER) as [someone]:
        for _ in range(BURST // 2):
            await someone.send("PING")
        for _ in range(BURST // 2):
            assert (await someone.frame())["msgType"] == "HEARTBEAT"


# Limits on the contents of a frame


async def test_a_frame_that_holds_too_much_is_told_what_of(node: OneNode) -> None:
    turn = {"role": "user", "content": "x"}
    wrong = {
        "nested deeper than 5 levels": '{"msgType":"HEARTBEAT","x":[[[[[]]]]]}',
        "history: more than 3 turns": json.dumps(
            {"msgType": "CHAT", "userId": USER, "contents": "x", "history": [turn] * 4}
        ),
        "the key 'userId' occurs more than once": '{"msgType":"HEARTBEAT","userId":10001,"userId":10002}',
        "the character NUL": json.dumps({"msgType": "CHAT", "userId": USER, "contents": "\0"}),
        "the number 1e999 is too large": '{"msgType":"HEARTBEAT","x":1e999}',
    }
    async with node.peer(USER, lang="en") as someone:
        for problem, text in wrong.items():
            await someone.send(text)
            told = await someone.frame()
            assert (told["msgType"], told["code"]) == ("SYSTEM", "BAD_REQUEST")
            assert problem in told["contents"]


# Sockets


async def test_a_user_has_so_many_sockets_and_the_newest_is_closed_with_4504(node: OneNode) -> None:
    async with many_sockets(node, *[USER] * EACH) as sockets:
        async with peer(node.now.ws(USER), lang="en") as one_more:
            await one_more.send_frame("INIT", userId=USER)
            assert await one_more.closed() == 4504
        assert "too many connections" in one_more.frames[-1]["contents"]
        for someone in sockets:
            await someone.send("PING")
            assert (await someone.frame())["msgType"] == "HEARTBEAT"
            await someone.login(USER)  # a second INIT does not count as another socket
        await sockets[0].connection.close()
        await wait_until(lambda: node.sessions() == EACH - 1, "the session is closed")
        async with node.peer(USER) as instead:
            await instead.send("PING")
            assert (await instead.frame())["msgType"] == "HEARTBEAT"


async def test_a_node_has_so_many_sockets_and_the_newest_is_closed_with_1013(node: OneNode) -> None:
    async with many_sockets(node, *map(user_id, range(10201, 10201 + ALL))) as sockets:
        async with peer(node.now.ws(USER), lang="en") as one_more:
            assert await one_more.closed() == 1013
        assert [told["msgType"] for told in one_more.frames] == ["SYSTEM"]
        assert "come back later" in one_more.frames[0]["contents"]
        with pytest.raises(InvalidStatus) as refused:
            async with connect(node.now.ws(USER), additional_headers={"X-Forwarded-For": "127.0.0.1"}, proxy=None):
                pass
        assert refused.value.response.status_code == 503  # a load balancer tries the next node
        await sockets[0].connection.close()
        await wait_until(lambda: node.sessions() == ALL - 1, "the session is closed")
        async with node.peer(USER) as instead:
            await instead.send("PING")
            assert (await instead.frame())["msgType"] == "HEARTBEAT"


async def test_the_client_comes_back_to_a_full_node_later(node: OneNode) -> None:
    async with many_sockets(node, *map(user_id, range(10201, 10201 + ALL))) as sockets:
        turned_away: asyncio.Queue[ConnectionChange] = asyncio.Queue()
        timing = Timing(later=timedelta(milliseconds=100))
        entering = asyncio.create_task(_ask(node.now.ws(), timing, turned_away.put_nowait))
        change = await turned_away.get()
        assert isinstance(change, Disconnected)
        assert change.why == Text.NODE_FULL.zh
        await sockets[0].connection.close()
        assert await entering


async def _ask(url: str, timing: Timing, on_change: Callable[[ConnectionChange], None]) -> str:
    async with Client(url, user_id(10301), timing=timing, on_change=on_change) as client:
        return await (await client.send("hello " + AT_ONCE)).text()
