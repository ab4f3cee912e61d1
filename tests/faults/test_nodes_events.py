"""Sockets of a user on two nodes: cancels and events that one of them causes and the other sees."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.servers import DemoBackend
from tests.support.talk import question

USER = 10001


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes that record text rarely: a socket of the node that answers has read much more than the record holds."""
    folder = tmp_path_factory.mktemp("events")
    with standing_nodes(folder, demo.url, "a", "b", flush_interval="1h", sweep_interval="1m") as nodes:
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
