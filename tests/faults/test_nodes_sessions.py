"""One session per user: the newest stays, and older ones are closed on all nodes."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from imstream.texts import Text
from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.peer import peer
from tests.support.servers import DemoBackend
from tests.support.waiting import wait_until

USER, OTHER = 10001, 10002


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes that allow one session per user."""
    with standing_nodes(tmp_path_factory.mktemp("one"), demo.url, "a", "b", sessions="one") as nodes:
        yield nodes


@pytest.mark.parametrize("newer", ["a", "b"])
async def test_a_newer_login_closes_the_older_session_on_whichever_node(nodes: ManyNodes, newer: str) -> None:
    async with nodes["a"].peer(USER, lang="en") as older, nodes["a"].peer(OTHER) as other:
        question = "who am I? [[demo first=0 pace=5ms length=60]]"
        await older.chat(USER, question, f"on-{newer}")
        async with nodes[newer].peer(USER, resume=older.told) as someone:
            assert await older.closed() == 4502
            assert older.frames[-1]["msgType"] == "SYSTEM"
            assert older.frames[-1]["contents"] == Text.REPLACED.en
            assert (await someone.end_of(f"on-{newer}")).events[-1] == "done"
            await other.send_frame("HEARTBEAT")
            await other.until(msgType="HEARTBEAT")


async def test_of_logins_at_the_same_moment_exactly_one_session_is_left(nodes: ManyNodes) -> None:
    for _ in range(10):
        async with AsyncExitStack() as stack:
            urls = [url for url in nodes.urls() for _ in range(2)]
            sockets = [await stack.enter_async_context(peer(f"{url}?userId={USER}")) for url in urls]
            await asyncio.gather(*(socket.send_frame("INIT", userId=USER) for socket in sockets))
            ends = [asyncio.create_task(socket.closed()) for socket in sockets]
            await wait_until(lambda ends=ends: sum(end.done() for end in ends) >= 3, "three are closed")
            [left] = [socket for socket, end in zip(sockets, ends, strict=True) if not end.done()]
            await left.send_frame("HEARTBEAT")
            await wait_until(lambda one=left: one.frames and one.frames[-1]["msgType"] == "HEARTBEAT", "one is served")
            assert [end.result() for end in ends if end.done()] == [4502] * 3
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
    nodes.check_logs()
