"""Resuming on the wire: a client that reconnects receives the missing text, and no text twice."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imstream.demo.answer import canned_answer
from imstream.keys import Keys
from imstream.store.inbox import ReplyGrew, notice_fields
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Told
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend
from tests.support.users import user_id
from tests.support.waiting import wait_until

USER, OTHER = user_id(10001), user_id(10002)

QUESTION = "你好 😀👍🏽 & 'hello' [[demo first=0 pace=1ms length=60]]"
WHOLE = "".join(canned_answer(QUESTION))
SLOW = "[[demo first=0 pace=5ms length=120]]"


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend, empty_redis: Topology) -> Iterator[OneNode]:
    """A node with two worker slots."""
    with standing_node(tmp_path_factory.mktemp("resume"), demo.url, empty_redis, concurrency=2) as node:
        yield node


async def _ask(node: OneNode, message_id: str) -> None:
    """Send the question and wait for the whole answer."""
    async with node.peer(USER) as someone:
        await someone.chat(USER, QUESTION, message_id)
        assert (await someone.end_of(message_id)).text == WHOLE


async def test_after_the_end_every_offset_gets_exactly_the_rest(node: OneNode) -> None:
    await _ask(node, "every")
    async with node.peer(USER) as someone:
        for offset in range(len(WHOLE) + 1):
            await someone.login(USER, {"every": Told(WHOLE[:offset], attempt=1, offset=offset)})
            told = await someone.end_of("every")
            assert told.text == WHOLE
            assert "restart" not in told.events
            assert told.terminal is not None
            assert told.terminal["event"] == "done"


numbers = iter(range(1_000_000))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 300), max_size=5))
async def test_however_often_the_socket_drops_the_text_is_whole(standing: OneNode, cuts: list[int]) -> None:
    question = "drop me [[demo first=0 pace=2ms length=100]]"
    message_id = f"dropped-{next(numbers)}"
    told: Told | None = None
    for cut in [*cuts, None]:
        async with standing.peer(USER, resume={message_id: told} if told else None) as someone:
            if told is None:
                await someone.chat(USER, question, message_id)
            if cut is None:
                await someone.end_of(message_id)
            while not (now := someone.told[message_id]).terminal and cut is not None and len(now.text) < cut:
                await someone.until(messageId=message_id)
            told = someone.told[message_id]
            if told.terminal:
                break
    assert told is not None
    assert told.text == "".join(canned_answer(question))
    assert "restart" not in told.events
    assert told.events.count("done") == 1


async def test_a_dropped_socket_costs_the_answer_nothing(node: OneNode) -> None:
    calls = node.ai_stats()["calls"]
    question = f"nobody listens {SLOW}"
    async with node.peer(USER) as someone:
        await someone.chat(USER, question, "alone")
        told = await someone.some_text("alone")
    await wait_until(lambda: node.unfinished() == 0, "it is answered without a client")
    async with node.peer(USER, resume={"alone": told}) as someone:
        assert (await someone.end_of("alone")).text == "".join(canned_answer(question))
    assert node.ai_stats()["calls"] == calls + 1


async def test_a_waiting_message_can_be_resumed(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        for number in range(2):
            await someone.chat(USER, f"{number} blocks {SLOW}", f"blocks-{number}")
        await someone.chat(USER, QUESTION, "patient")
    async with node.peer(USER, resume={"patient": Told()}) as someone:
        told = await someone.end_of("patient")
        assert (told.text, told.events[-1]) == (WHOLE, "done")


async def test_who_knows_more_or_other_than_the_node_starts_over(node: OneNode) -> None:
    await _ask(node, "wrong")
    wrong = {
        "beyond the end": Told("?" * (len(WHOLE) + 1), attempt=1, offset=len(WHOLE) + 1),
        "far beyond": Told("?", attempt=1, offset=2**53),
        "an attempt that is over": Told("half of another answer", attempt=7, offset=22),
    }
    async with node.peer(USER) as someone:
        for what, known in wrong.items():
            await someone.login(USER, {"wrong": known})
            told = await someone.end_of("wrong")
            assert told.events[0] == "restart", what
            assert told.text == WHOLE, what


async def test_several_messages_are_resumed_at_once_each_from_its_place(node: OneNode) -> None:
    for message_id in ("one", "two"):
        await _ask(node, message_id)
    async with node.peer(USER) as someone:
        await someone.chat(USER, f"three {SLOW}", "three")
        three = await someone.some_text("three", 10)
    known = {"one": Told(WHOLE[:5], 1, 5), "two": Told(), "three": three}
    async with node.peer(USER, resume=known) as someone:
        for message_id in known:
            await someone.end_of(message_id)
        assert someone.told["one"].text == someone.told["two"].text == WHOLE
        assert someone.told["three"].text == "".join(canned_answer(f"three {SLOW}"))


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_what_has_expired_or_never_was_is_told_as_expired(lang: str, node: OneNode) -> None:
    text = {
        "zh": "这条消息的回答已过期,请重新发送",
        "en": "The reply to this message has expired, please send it again",
    }[lang]
    message_id = f"old-{lang}"
    await _ask(node, message_id)
    await wait_until(lambda: node.sessions() == 0 and node.unfinished() == 0, "it is over")
    [key] = [key for key in node.events() if key.endswith(message_id)]
    assert 0 < node.redis.pttl(key) <= 15 * 60 * 1000
    node.redis.pexpire(key, 1)  # as Redis does after 15 minutes
    await wait_until(lambda: not node.redis.exists(key), "it has expired")
    async with node.peer(USER, lang=lang) as someone:
        points = [{"messageId": one, "attempt": 1, "offset": 3} for one in (message_id, "never-was")]
        await someone.send_frame("INIT", userId=USER, resume=points)
        assert (await someone.frame())["msgType"] == "INIT"
        for point in points:
            told = await someone.frame()
            assert (told["msgType"], told["code"], told["messageId"]) == ("CHAT", "EXPIRED", point["messageId"])
            assert told["contents"] == text
        # Sent again, it is a new message.
        assert (await someone.chat(USER, QUESTION, message_id))["event"] == "accepted"
        assert (await someone.end_of(message_id)).text == WHOLE


async def test_nobody_resumes_the_message_of_another_user(node: OneNode) -> None:
    await _ask(node, "private")
    async with node.peer(OTHER) as other:
        await other.send_frame("INIT", userId=OTHER, resume=[{"messageId": "private"}])
        assert (await other.until(messageId="private"))["code"] == "EXPIRED"  # as for an unknown message


async def test_a_message_sent_again_is_answered_from_the_record(node: OneNode) -> None:
    calls = node.ai_stats()["calls"]
    question = f"once is enough {SLOW}"
    whole = "".join(canned_answer(question))
    async with node.peer(USER) as someone, node.peer(USER) as elsewhere:
        await someone.chat(USER, question, "again")
        await someone.some_text("again", 10)
        await elsewhere.chat(USER, question, "again")  # while it runs, on another socket
        assert (await elsewhere.end_of("again")).text == whole
        assert (await someone.end_of("again")).text == whole
        await someone.chat(USER, question, "again")  # after its end, on the same socket
        assert (await someone.end_of("again")).text == whole
        await elsewhere.chat(USER, question, "again")  # and on another one
        assert (await elsewhere.end_of("again")).text == whole
    await node.settled()
    assert node.ai_stats()["calls"] == calls + 1


async def test_every_socket_of_a_user_follows_what_the_user_asks_from_then_on(node: OneNode) -> None:
    async with node.peer(USER) as left, node.peer(USER) as right, node.peer(OTHER) as stranger:
        await left.chat(USER, f"left {SLOW}", "left")
        await right.chat(USER, f"right {SLOW}", "right")
        for message_id in ("left", "right"):  # both have begun
            await left.some_text(message_id)
        async with node.peer(USER) as late:
            for message_id in ("left", "right"):
                whole = "".join(canned_answer(f"{message_id} {SLOW}"))
                assert (await left.end_of(message_id)).text == (await right.end_of(message_id)).text == whole
            await late.send("PING")
            await late.until(msgType="HEARTBEAT")
            assert late.told == {}  # replies that began before its login are sent only if it resumes them
        await stranger.send("PING")
        await stranger.until(msgType="HEARTBEAT")
        assert stranger.told == {}


async def test_a_late_notice_that_an_answer_begins_does_not_tell_it_again(node: OneNode) -> None:
    async with node.peer(USER) as earlier:
        await earlier.chat(USER, QUESTION, "elsewhere")
        await earlier.end_of("elsewhere")
    async with node.peer(USER) as someone:
        await someone.chat(USER, QUESTION, "here")
        assert (await someone.end_of("here")).text == WHOLE
        for message_id in (
            "here",
            "elsewhere",
        ):  # as another node sends them; this socket has received the end of the first
            notice = notice_fields(ReplyGrew(USER, message_id, begun=True))
            node.redis.xadd(Keys().inbox("0"), dict(zip(notice[::2], notice[1::2], strict=True)))
            node.redis.expire(Keys().inbox("0"), 60)
        assert (await someone.end_of("elsewhere")).text == WHOLE
        await someone.send_frame("HEARTBEAT")
        await someone.until(msgType="HEARTBEAT")  # the peer fails on a frame after a terminal event
