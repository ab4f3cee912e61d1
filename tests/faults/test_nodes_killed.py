"""Nodes are killed: others answer their messages, and users get the answers from them, whole and once (I1, I5)."""

import asyncio
from collections.abc import Iterator
from functools import partial

import pytest

from imstream.client import Client
from imstream.client.connection import ConnectionChange, Disconnected
from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.peer import all_answered
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole
from tests.support.waiting import wait_until

USER, OTHER = 10001, 10002
ACTIVE = 8


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Three nodes. Sweeps are so rare that no test depends on one."""
    folder = tmp_path_factory.mktemp("killed")
    with standing_nodes(folder, demo.url, "a", "b", "c", queue_limit=400, sweep_interval="1m") as nodes:
        yield nodes


async def test_the_user_of_a_killed_node_gets_one_whole_answer_from_another_or_finds_it_later(nodes: ManyNodes) -> None:
    asked, other = question(120, stall=1), question(120, "else", stall=1)
    async with nodes["a"].peer(USER) as someone, nodes["a"].peer(OTHER) as absent:
        await someone.chat(USER, asked, "m1")
        await absent.chat(OTHER, other, "m2")
        await absent.some_text("m2")
        told = await someone.some_text("m1", 60)
        await nodes.killed("a")
    async with nodes["b"].peer(USER, resume={"m1": told}) as someone:
        told = await someone.end_of("m1")
    assert told.text == whole(asked)
    assert told.events.count("restart") == 1
    await nodes["a"].all_finished()
    assert nodes.any.recorded(USER, "m1") == ("done", whole(asked))
    assert nodes.any.recorded(OTHER, "m2") == ("done", whole(other))
    assert len(nodes.opened_by(USER, "m1")) == len(nodes.opened_by(OTHER, "m2")) == 2
    async with nodes["c"].peer(OTHER) as absent:  # much later, without knowing that it was accepted
        await absent.chat(OTHER, other, "m2")
        assert (await absent.end_of("m2")).text == whole(other)
    assert nodes.ai_calls() == 4


async def test_when_several_nodes_are_killed_at_once_the_last_one_answers_for_all(nodes: ManyNodes) -> None:
    asked = {USER + n: {f"several-{k}": question(30 + 10 * n, about=f"{n} {k}") for k in range(2)} for n in range(6)}
    urls = {user: nodes.urls("ab"[user % 2]) for user in asked}
    asking = asyncio.create_task(all_answered(urls, asked))
    await wait_until(lambda: nodes.any.ended() > 0, "the first answer has ended", limit=20)
    running = len(nodes["a"].pending()) + len(nodes["b"].pending())
    assert running
    await nodes.killed("a", "b")
    told = await asking
    for (user, message_id), one in told.items():
        assert one.text == whole(asked[user][message_id])
        assert one.events[-1] == "done"
        assert nodes.any.recorded(user, message_id) == ("done", one.text)
    assert any("restart" in one.events for one in told.values())
    assert nodes.ai_calls() <= len(told) + running


async def test_a_killed_node_that_comes_back_while_its_stream_is_adopted_answers_what_is_new(
    nodes: ManyNodes,
) -> None:
    asked = {f"old-{n}": question(100 + n, stall=1) for n in range(ACTIVE)}
    async with nodes["a"].peer(USER) as someone:
        for message_id, text in asked.items():
            await someone.chat(USER, text, message_id)
        for message_id in asked:
            await someone.some_text(message_id)
        await nodes.killed("a")
        old = {message_id: someone.told[message_id] for message_id in asked}
    await asyncio.gather(*(nodes.opened(USER, message_id, 2) for message_id in asked))
    await nodes.start("a")
    asked["new"] = question(5)
    async with nodes["a"].peer(USER, resume=old) as someone:
        await someone.chat(USER, asked["new"], "new")
        for message_id, text in asked.items():
            assert (await someone.end_of(message_id)).text == whole(text)
    assert nodes.opened_by(USER, "new") == ["a"]
    by = [nodes.opened_by(USER, message_id) for message_id in old]
    assert all(opened == by[0] and len(opened) == 2 for opened in by), "one node adopts and finishes all"
    assert nodes.ai_calls() == 2 * ACTIVE + 1


async def test_hundreds_of_clients_that_lose_their_node_come_back_spread_over_time_and_all_are_served(
    nodes: ManyNodes,
) -> None:
    waits: dict[int, float] = {}

    def note(client: int, change: ConnectionChange) -> None:
        if isinstance(change, Disconnected):  # a client with a short wait may lose its connection again
            waits.setdefault(client, change.retry_in.total_seconds())

    clients = [Client(nodes.urls("a"), USER + n, on_change=partial(note, n)) for n in range(250)]
    asked = [question(20, n, pace="50ms") for n in range(len(clients))]
    try:
        for first in range(
            0, len(clients), 25
        ):  # all at once, a busy node would refuse some, and they would log in to another node
            await asyncio.gather(*(client.__aenter__() for client in clients[first : first + 25]))
        replies = await asyncio.gather(
            *(client.send(text, message_id="crowd") for client, text in zip(clients, asked, strict=True))
        )
        await asyncio.gather(*(reply.accepted() for reply in replies))
        waits.clear()  # those of clients that a busy node has refused
        await nodes.killed("a")
        texts = await asyncio.gather(*(reply.text() for reply in replies))
    finally:
        await asyncio.gather(*(client.__aexit__(None, None, None) for client in clients))
    assert texts == [whole(text) for text in asked]
    assert sum(reply.repeated for reply in replies) == 0
    # Full jitter: the first waits are spread evenly over half a second.
    firsts = [sum(low <= wait * 20 < low + 1 for wait in waits.values()) for low in range(10)]
    assert sum(firsts) == len(waits) > 50
    assert max(firsts) < len(waits) / 4, firsts
