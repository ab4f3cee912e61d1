"""Sockets of a user on two nodes: cancels and events that one of them causes and the other sees."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole

USER = 10001
WANTS = ["asked", "status"]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes that record text rarely: a socket of the node that answers has read much more than the record holds."""
    folder = tmp_path_factory.mktemp("events")
    with standing_nodes(folder, demo.url, "a", "b", flush_interval="1h", sweep_interval="1m", concurrency=1) as nodes:
        yield nodes


async def test_a_cancel_on_another_node_takes_no_text_away_that_a_client_has_read(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as asking, nodes["b"].peer(USER) as elsewhere:
        await asking.chat(USER, question(2000), "m1")
        await asking.some_text("m1", 100)
        await elsewhere.send_frame("CANCEL", messageId="m1")
        read, told = await asyncio.gather(asking.end_of("m1"), elsewhere.end_of("m1"))
    assert read.events[-1] == told.events[-1] == "cancelled"
    assert "restart" not in read.events
    assert read.terminal is not None
    assert read.terminal["offset"] == len(read.text) >= 100
    assert nodes.any.recorded(USER, "m1") == ("cancelled", read.text)
    assert told.text == read.text


async def test_a_socket_on_another_node_receives_questions_and_states_at_once(nodes: ManyNodes) -> None:
    long, short = question(2000), question(20)
    async with nodes["a"].peer(USER) as asking, nodes["b"].peer(USER) as elsewhere, nodes["b"].peer(USER) as plain:
        await elsewhere.send_frame("INIT", userId=USER, wants=WANTS)
        assert (await elsewhere.until(msgType="INIT"))["messages"] == []
        await asking.chat(USER, long, "runs")
        assert (await elsewhere.until(event="asked", messageId="runs"))["contents"] == long
        # Before that, it is queued for a moment if its worker is slow to open it.
        await elsewhere.until(event="status", messageId="runs", state="started")
        await asking.chat(USER, short, "waits")
        assert (await elsewhere.until(event="asked", messageId="waits"))["contents"] == short
        queued = await elsewhere.until(event="status", messageId="waits")
        assert queued["state"] == "queued"
        assert "position" not in queued  # it is known on node a only
        await asking.send_frame("CANCEL", messageId="runs")
        for socket in (asking, elsewhere, plain):
            assert (await socket.end_of("waits")).text == whole(short)
        assert elsewhere.told["waits"].events[:3] == ["asked", "status", "status"]
        assert {*plain.told["waits"].events} == {"delta", "done"}


async def test_a_device_on_another_node_finds_the_whole_exchange_after_its_node_has_died(nodes: ManyNodes) -> None:
    asked = {"ended": question(20), "cut": question(120, stall=1)}
    async with nodes["a"].peer(USER) as asking:
        await asking.chat(USER, asked["ended"], "ended")
        await asking.end_of("ended")
        await asking.chat(USER, asked["cut"], "cut")
        await asking.some_text("cut", 20)
        await nodes.killed("a")
    async with nodes["b"].peer(USER) as device:
        await device.send_frame("INIT", userId=USER, wants=WANTS)
        messages = (await device.until(msgType="INIT"))["messages"]
        assert messages[-2:] == [{"messageId": "ended", "state": "done"}, {"messageId": "cut", "state": "started"}]
        resume = [{"messageId": one} for one in asked]
        await device.send_frame("INIT", userId=USER, wants=WANTS, resume=resume)
        for message_id, text in asked.items():
            assert (await device.end_of(message_id)).text == whole(text)
            [told] = [one for one in device.frames if (one.get("event"), one.get("messageId")) == ("asked", message_id)]
            assert told["contents"] == text
