"""Events that a client asks for, the messages that a second device finds, and messages that are sent again."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from imstream.demo.answer import canned_answer
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Frame, Peer, Told, peer
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend
from tests.support.users import user_id

USER = user_id(10001)

BRIEF = "[[demo first=0 pace=1ms length=30]]"
LONG = "[[demo first=0 pace=10ms length=5000]]"


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend, empty_redis: Topology) -> Iterator[OneNode]:
    """A node with one worker slot."""
    with standing_node(tmp_path_factory.mktemp("events"), demo.url, empty_redis, concurrency=1) as node:
        yield node


@asynccontextmanager
async def device(node: OneNode, *wants: str, **fields: Any) -> AsyncIterator[tuple[Peer, Frame]]:  # noqa: ANN401 - any field
    """Connect and log in with these wants; the socket and its welcome."""
    async with peer(node.now.ws(USER), lang="en") as someone:
        await someone.send_frame("INIT", userId=USER, wants=[*wants], **fields)
        yield someone, await someone.frame()


async def cancelled(someone: Peer, *message_ids: str) -> None:
    """Cancel messages, and wait for their ends."""
    for message_id in message_ids:
        await someone.send_frame("CANCEL", messageId=message_id)
        await someone.end_of(message_id)


def about(someone: Peer, message_id: str) -> list[str]:
    """The events of a message in order, with one `delta` for several."""
    events = someone.told[message_id].events
    return [
        event for event, before in zip(events, [None, *events], strict=False) if event != before or event != "delta"
    ]


# Messages that are sent again


async def test_a_message_sent_again_after_its_end_has_no_place_in_the_queue(node: OneNode) -> None:
    async with node.peer(USER, lang="en") as someone:
        assert (await someone.chat(USER, f"hello {BRIEF}", "again"))["position"] == 1
        first = await someone.end_of("again")
        accepted = await someone.chat(USER, f"hello {BRIEF}", "again")
        assert "position" not in accepted
        assert accepted["contents"] == "This message was answered before; the recorded answer follows"
        assert (await someone.end_of("again")).text == first.text


async def test_an_id_with_another_text_is_refused_in_each_state_of_its_message(node: OneNode) -> None:
    async with node.peer(USER, lang="en") as someone, node.peer(USER, lang="en") as other:

        async def is_refused(message_id: str) -> None:
            await other.send_frame("CHAT", userId=USER, contents="something else", messageId=message_id)
            refused = await other.until(msgType="SYSTEM")
            assert (refused["code"], refused["messageId"]) == ("BAD_REQUEST", message_id)
            assert "messageId: it belongs to a message with another text" in refused["contents"]

        await someone.chat(USER, f"first {LONG}", "runs")
        await someone.some_text("runs")
        await someone.chat(USER, f"second {BRIEF}", "waits")
        await is_refused("runs")
        await is_refused("waits")
        await cancelled(someone, "runs")
        told = await someone.end_of("waits")
        await is_refused("waits")
        assert told.text == "".join(canned_answer(f"second {BRIEF}"))


# Questions


async def test_another_socket_receives_the_question_before_the_answer_if_it_requests_it(node: OneNode) -> None:
    question = f"What is 你好? {BRIEF}"
    async with node.peer(USER) as asking, device(node, "asked", "nonsense") as (other, _), device(node) as (plain, _):
        await asking.chat(USER, question, "m")
        for socket in (asking, other, plain):
            await socket.end_of("m")
        assert about(asking, "m") == ["accepted", "delta", "done"]
        assert about(other, "m") == ["asked", "delta", "done"]
        assert about(plain, "m") == ["delta", "done"]
        [asked] = [frame for frame in other.frames if frame.get("event") == "asked"]
        assert (asked["msgType"], asked["messageId"], asked["contents"]) == ("CHAT", "m", question)
        assert other.told["m"].text == asking.told["m"].text


async def test_the_question_of_a_message_that_waits_is_sent_at_once(node: OneNode) -> None:
    async with node.peer(USER) as asking, device(node, "asked") as (other, _), device(node) as (plain, _):
        await asking.chat(USER, f"first {LONG}", "blocks")
        await asking.some_text("blocks")  # cancelled before it begins, it would not be told to the plain one
        await asking.chat(USER, f"second {BRIEF}", "later-on")
        asked = await other.until(event="asked", messageId="later-on")
        assert asked["contents"] == f"second {BRIEF}"
        await cancelled(asking, "later-on", "blocks")
        await other.end_of("blocks")
        assert about(other, "later-on") == ["asked", "cancelled"]
        await plain.end_of("blocks")
        assert "later-on" not in plain.told


async def test_a_question_is_kept_up_to_a_length(node: OneNode) -> None:
    question = f"{BRIEF} {'word ' * 2_000}"
    async with node.peer(USER) as asking, device(node, "asked") as (other, _):
        await asking.chat(USER, question, "long")
        assert (await other.until(event="asked"))["contents"] == question[:8_191] + "…"
        await asking.end_of("long")
        await other.end_of("long")


async def test_a_second_device_finds_all_messages_and_resumes_the_whole_exchange(node: OneNode) -> None:
    questions = {"1-ended": f"first {BRIEF}", "2-runs": f"second {LONG}", "3-waits": f"third {BRIEF}"}
    async with node.peer(USER) as asking:
        await asking.chat(USER, questions["1-ended"], "1-ended")
        await asking.end_of("1-ended")
        await asking.chat(USER, questions["2-runs"], "2-runs")
        await asking.some_text("2-runs", 100)
        await asking.chat(USER, questions["3-waits"], "3-waits")
        async with device(node, "asked") as (other, welcome):
            found = welcome["messages"][-3:]
            states = {"1-ended": "done", "2-runs": "started", "3-waits": "queued"}
            assert found == [{"messageId": one, "state": state} for one, state in states.items()]
            await other.send_frame("INIT", userId=USER, wants=["asked"], resume=[{"messageId": one} for one in states])
            assert (await other.end_of("1-ended")).text == asking.told["1-ended"].text
            await other.some_text("2-runs", 100)
            await cancelled(asking, "2-runs")
            await asking.end_of("3-waits")
            for message_id, question in questions.items():
                assert (await other.end_of(message_id)).text == asking.told[message_id].text
                assert about(other, message_id)[0] == "asked"
                [asked] = [
                    one for one in other.frames if (one.get("event"), one.get("messageId")) == ("asked", message_id)
                ]
                assert asked["contents"] == question


async def test_a_client_without_wants_receives_no_list_and_no_question(node: OneNode) -> None:
    async with node.peer(USER) as asking:
        await asking.chat(USER, f"hello {BRIEF}", "plain")
        await asking.end_of("plain")
    async with device(node, resume=[{"messageId": "plain"}]) as (someone, welcome):
        assert "messages" not in welcome
        await someone.end_of("plain")
        assert about(someone, "plain") == ["delta", "done"]


async def test_a_later_login_replaces_the_wants(node: OneNode) -> None:
    async with node.peer(USER) as asking, device(node, "asked", "status") as (other, welcome):
        assert "messages" in welcome
        await other.send_frame("INIT", userId=USER)
        assert "messages" not in await other.until(msgType="INIT")
        await asking.chat(USER, f"hello {BRIEF}", "later")
        await other.end_of("later")
        assert about(other, "later") == ["delta", "done"]


async def test_a_client_that_continues_in_the_middle_receives_no_question(node: OneNode) -> None:
    async with node.peer(USER) as asking:
        await asking.chat(USER, f"hello {LONG}", "middle")
        told = await asking.some_text("middle", 20)
        async with device(node, "asked", resume=[{"messageId": "middle", **told.point}]) as (other, _):
            other.told["middle"] = Told(told.text, told.attempt, told.offset)
            await other.some_text("middle", len(told.text) + 1)
            assert about(other, "middle") == ["delta"]
        await cancelled(asking, "middle")


@pytest.mark.parametrize("wants", ["asked", [7], ["x"] * 17, {"asked": True}])
async def test_wants_that_are_no_short_list_of_names_are_refused(node: OneNode, wants: object) -> None:
    async with peer(node.now.ws(USER)) as someone:
        await someone.send_frame("INIT", userId=USER, wants=wants)
        refused = await someone.frame()
        assert (refused["msgType"], refused["code"]) == ("SYSTEM", "BAD_REQUEST")
