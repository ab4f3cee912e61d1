"""Nodes that are told to end while others live: what they cannot finish is taken over at once, and nobody notices."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from imstream.ai.demo.answer import canned_answer
from imstream.client import Client
from imstream.client.errors import Unavailable
from tests.support.many_nodes import becomes, many_nodes, why_not

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.many_nodes import ManyNodes
    from tests.support.servers import DemoBackend

USER, OTHER = 10001, 10002

A_LONG_LEASE = "10m"
"""So long that nothing in a test happens because it has ended."""


def question(length: int, about: object = "") -> str:
    return f"tell me more {about} [[demo first=0 length={length} pace=10ms]]"


def whole(asked: str) -> str:
    return "".join(canned_answer(asked))


async def test_what_a_node_cannot_finish_before_it_ends_is_adopted_at_once(demo: DemoBackend, tmp_path: Path) -> None:
    short, long = question(30), question(250)
    limits = {"lease": A_LONG_LEASE, "drain_grace": "1s", "max_deliveries": 1}
    async with many_nodes(tmp_path, demo.url, "a", "b", **limits) as nodes:
        async with nodes["a"].peer(USER) as someone, nodes["a"].peer(OTHER) as idle:
            await someone.chat(USER, long, "long")
            await someone.chat(USER, short, "short")
            await someone.some_text("short")
            nodes["a"].now.process.signal(signal.SIGTERM)
            assert await idle.closed() == 1012
            assert someone.told["long"].terminal is None
            assert await asyncio.to_thread(why_not, nodes["a"], "/readyz") == "draining"
            assert (await someone.end_of("short")).text == whole(short)
            assert await someone.closed() == 1012
        async with nodes["b"].peer(USER, resume={"long": someone.told["long"]}) as someone:
            told = await someone.end_of("long")
        assert told.text == whole(long)
        assert told.events.count("restart") == 1
        assert await nodes["a"].died() == 0
        assert nodes.holder("a") is None
        assert nodes.opened_by(USER, "long") == ["a", "b"]
        assert nodes.opened_by(USER, "short") == ["a"]
        await nodes.settled()


async def test_requests_that_wait_on_a_node_that_ends_are_adopted_at_once(demo: DemoBackend, tmp_path: Path) -> None:
    limits = {"lease": A_LONG_LEASE, "drain_grace": "0.1s", "concurrency": 1}
    async with many_nodes(tmp_path, demo.url, "a", "b", **limits) as nodes:
        async with nodes["a"].peer(USER) as someone:
            for n in range(4):
                await someone.chat(USER, question(20 + 80 * (n == 0), n), f"m{n}")
            await someone.some_text("m0")
            nodes["a"].now.process.signal(signal.SIGTERM)
            assert await someone.closed() == 1012
        async with nodes["b"].peer(USER, resume=someone.told) as someone:
            for n in range(4):
                assert (await someone.end_of(f"m{n}")).text == whole(question(20 + 80 * (n == 0), n))
        assert await nodes["a"].died() == 0
        assert nodes.ai_calls() == 5
        await nodes.settled()


class _Talk:
    """A user who asks one thing after the other until told to stop."""

    def __init__(self, nodes: ManyNodes, user: int) -> None:
        self.user = user
        self.repeated = 0
        self.texts: dict[str, tuple[str, str]] = {}
        """What was asked and what was answered, by message id."""
        names = list(nodes.nodes)
        self._urls = nodes.urls(names[user % len(names)])

    async def go_on(self, over: asyncio.Event) -> None:
        async with Client(self._urls, self.user) as client:
            while not over.is_set():
                message_id = f"m{len(self.texts)}"
                asked = question(20 + 5 * (self.user % 7), f"{self.user} {message_id}")
                reply = await client.send(asked, message_id=message_id)
                try:
                    text = await reply.text()
                except Unavailable:  # not accepted: it came when its node was just about to close the socket
                    await asyncio.sleep(0.05)
                    continue
                self.texts[message_id] = (asked, text)
                self.repeated += reply.repeated


async def test_a_rolling_restart_under_load_loses_and_repeats_nothing(demo: DemoBackend, tmp_path: Path) -> None:
    limits = {"lease": A_LONG_LEASE, "drain_grace": "0.2s"}
    async with many_nodes(tmp_path, demo.url, "a", "b", "c", **limits) as nodes:
        talks = [_Talk(nodes, USER + n) for n in range(20)]
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for talk in talks:
                group.create_task(talk.go_on(over))
            for name in nodes.nodes:
                answered = sum(len(talk.texts) for talk in talks)
                assert await nodes[name].terminated() == 0
                await nodes.start(name)
                await becomes(nodes[name], None)
                assert sum(len(talk.texts) for talk in talks) > answered, "the others went on meanwhile"
            over.set()
        for talk in talks:
            assert talk.repeated == 0
            for message_id, (asked, text) in talk.texts.items():
                assert text == whole(asked)
                assert nodes.any.recorded(talk.user, message_id) == ("done", text)
        restarted = nodes.ai_calls() - sum(len(talk.texts) for talk in talks)
        assert 0 < restarted <= len(talks) * len(nodes.nodes), "some were cut in the middle, and no other asked twice"
        await nodes.settled()
