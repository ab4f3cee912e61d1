"""CANCEL on the wire, in each state of a message."""

from collections.abc import Iterator

import pytest

from imstream.demo.answer import canned_answer
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Told
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend
from tests.support.users import user_id
from tests.support.waiting import wait_until

USER, OTHER = user_id(10001), user_id(10002)

BRIEF = "[[demo first=0 pace=1ms length=30]]"
LONG = "[[demo first=0 pace=10ms length=5000]]"


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend, empty_redis: Topology) -> Iterator[OneNode]:
    """A node with one worker slot."""
    with standing_node(tmp_path_factory.mktemp("cancel"), demo.url, empty_redis, concurrency=1) as node:
        yield node


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_a_running_answer_is_stopped_and_its_text_so_far_stays(lang: str, node: OneNode) -> None:
    abandoned = node.ai_stats()["abandoned"]
    question, message_id = f"tell me {LONG}", f"running-{lang}"
    async with node.peer(USER, lang=lang) as someone:
        await someone.chat(USER, question, message_id)
        await someone.some_text(message_id, 40)
        await someone.send_frame("CANCEL", messageId=message_id)
        told = await someone.end_of(message_id)
        assert told.terminal is not None
        assert (told.terminal["event"], told.terminal["code"]) == ("cancelled", "SUCCESS")
        assert told.terminal["contents"] == {"zh": "已取消", "en": "Cancelled"}[lang]
        await wait_until(lambda: node.ai_stats()["abandoned"] == abandoned + 1, "the call to the backend is closed")
    assert told.events.count("cancelled") == 1
    assert "".join(canned_answer(question)).startswith(told.text)
    assert node.recorded(USER, message_id) == ("cancelled", told.text)
    async with node.peer(USER, resume={message_id: Told()}) as later:
        again = await later.end_of(message_id)
        assert (again.text, again.events[-1]) == (told.text, "cancelled")


async def test_a_waiting_message_is_never_begun(node: OneNode) -> None:
    calls = node.ai_stats()["calls"]
    async with node.peer(USER) as someone:
        await someone.chat(USER, f"first {LONG}", "blocking")
        await someone.some_text("blocking")
        await someone.chat(USER, f"second {LONG}", "waiting")
        await someone.send_frame("CANCEL", messageId="waiting")
        assert (await someone.end_of("waiting")).events == ["accepted", "cancelled"]
        await someone.send_frame("CANCEL", messageId="blocking")
        assert (await someone.end_of("blocking")).events[-1] == "cancelled"
    await node.settled()
    assert node.ai_stats()["calls"] == calls + 1
    assert node.recorded(USER, "waiting") == ("cancelled", "")


async def test_a_message_cancelled_in_the_same_breath_ends_once(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        for number in range(20):
            message_id = f"breath-{number}"
            await someone.send_frame("CHAT", userId=USER, contents=f"{number} {LONG}", messageId=message_id)
            await someone.send_frame("CANCEL", messageId=message_id)
        for number in range(20):
            assert (await someone.end_of(f"breath-{number}")).events[-1] == "cancelled"
    await node.settled()


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_after_the_end_it_is_too_late_and_an_unknown_message_is_unknown(lang: str, node: OneNode) -> None:
    too_late = {"zh": "这条消息的回答已经结束,无法取消", "en": "The answer to this message had already ended"}[lang]
    unknown = {"zh": "没有找到这条消息", "en": "There is no such message"}[lang]
    ended = f"ended-{lang}"
    async with node.peer(USER, lang=lang) as someone:
        await someone.chat(USER, f"hello {BRIEF}", ended)
        told = await someone.end_of(ended)
        for message_id, code, text in ((ended, "TOO_LATE", too_late), ("never-sent", "UNKNOWN", unknown)):
            await someone.send_frame("CANCEL", messageId=message_id)
            said = await someone.frame()
            assert (said["msgType"], said["code"], said["messageId"]) == ("SYSTEM", code, message_id)
            assert said["contents"] == text
    assert node.recorded(USER, ended) == ("done", told.text)
    assert node.record(USER, "never-sent") == []


async def test_a_second_cancel_is_too_late(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        await someone.chat(USER, f"hello {LONG}", "twice")
        await someone.some_text("twice")
        await someone.send_frame("CANCEL", messageId="twice")
        await someone.end_of("twice")
    async with node.peer(USER) as someone:
        await someone.send_frame("CANCEL", messageId="twice")
        receipt = await someone.frame()
        assert (receipt["msgType"], receipt["code"], receipt["messageId"]) == ("SYSTEM", "TOO_LATE", "twice")


async def test_nobody_cancels_the_message_of_another_user(node: OneNode) -> None:
    async with node.peer(USER) as someone, node.peer(OTHER) as other:
        await someone.chat(USER, "mine [[demo first=0 pace=5ms length=100]]", "mine")
        await someone.some_text("mine")
        await other.send_frame("CANCEL", messageId="mine")
        assert (await other.frame())["code"] == "UNKNOWN"  # as for an unknown message
        await other.send_frame("CANCEL", userId=USER, messageId="mine")
        assert (await other.frame())["code"] == "FORBIDDEN"
        assert (await someone.end_of("mine")).events[-1] == "done"


async def test_another_socket_of_the_user_may_cancel_and_both_are_told(node: OneNode) -> None:
    async with node.peer(USER) as asking, node.peer(USER) as elsewhere:
        await asking.chat(USER, f"hello {LONG}", "from-elsewhere")
        told = await asking.some_text("from-elsewhere")
        await elsewhere.send_frame("CANCEL", messageId="from-elsewhere")
        assert (await elsewhere.end_of("from-elsewhere")).events[-1] == "cancelled"
        assert (await asking.end_of("from-elsewhere")).events[-1] == "cancelled"
        assert told.text
