"""Nodes drain while others live: others take over unfinished answers at once, and clients do not notice."""

import asyncio
import signal
from pathlib import Path
from typing import Any

from tests.support.many_nodes import becomes, many_nodes, why_not
from tests.support.servers import DemoBackend
from tests.support.talk import Talk, question, whole

USER, OTHER = 10001, 10002

A_LONG_LEASE = "10m"
"""So long that no test depends on its end."""


async def test_what_a_node_cannot_finish_before_it_ends_is_adopted_at_once(demo: DemoBackend, tmp_path: Path) -> None:
    short, long = question(30), question(100, stall=1)
    limits: dict[str, Any] = {"lease": A_LONG_LEASE, "drain_grace": "2s", "max_deliveries": 1}
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
    limits: dict[str, Any] = {"lease": A_LONG_LEASE, "drain_grace": "0.1s", "concurrency": 1}
    asked = {f"m{n}": question(20, n, stall=int(n == 0)) for n in range(4)}
    async with many_nodes(tmp_path, demo.url, "a", "b", **limits) as nodes:
        async with nodes["a"].peer(USER) as someone:
            for message_id, text in asked.items():
                await someone.chat(USER, text, message_id)
            await someone.some_text("m0")
            nodes["a"].now.process.signal(signal.SIGTERM)
            assert await someone.closed() == 1012
        async with nodes["b"].peer(USER, resume=someone.told) as someone:
            for message_id, text in asked.items():
                assert (await someone.end_of(message_id)).text == whole(text)
        assert await nodes["a"].died() == 0
        assert '"event":"drained","unfinished":4,' in nodes["a"].now.process.output()
        assert nodes.ai_calls() == 5
        await nodes.settled()


async def test_a_rolling_restart_under_load_loses_and_repeats_nothing(demo: DemoBackend, tmp_path: Path) -> None:
    limits: dict[str, Any] = {"lease": A_LONG_LEASE, "drain_grace": "0.2s"}
    async with many_nodes(tmp_path, demo.url, "a", "b", "c", **limits) as nodes:
        talks = [Talk(nodes, USER + n) for n in range(20)]
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for talk in talks:
                group.create_task(talk.go_on(over))
            for name in nodes.nodes:
                answered = sum(len(talk.texts) for talk in talks)
                assert await nodes[name].terminated() == 0
                await nodes.start(name)
                await becomes(nodes[name], None)
                assert sum(len(talk.texts) for talk in talks) > answered, "the other answers went on"
            over.set()
        for talk in talks:
            assert talk.repeated == 0
            for message_id, (asked, text) in talk.texts.items():
                assert text == whole(asked)
                assert nodes.any.recorded(talk.user, message_id) == ("done", text)
        restarted = nodes.ai_calls() - sum(len(talk.texts) for talk in talks)
        assert 0 < restarted <= len(talks) * len(nodes.nodes), "only interrupted answers are asked twice"
        await nodes.settled()


async def test_a_node_that_drains_hands_over_its_adopted_streams_as_well(demo: DemoBackend, tmp_path: Path) -> None:
    asked = question(6000)
    limits: dict[str, Any] = {"lease": A_LONG_LEASE, "drain_grace": "100ms", "sweep_interval": "10m"}
    async with many_nodes(tmp_path, demo.url, "a", "b", "c", **limits) as nodes:
        async with nodes["a"].peer(USER) as someone:
            await someone.chat(USER, asked, "m")
            await someone.some_text("m")
            assert await nodes["a"].terminated() == 0
        [_, second] = await nodes.opened(USER, "m", 2)
        third = "bc".replace(second, "")
        assert await nodes[second].terminated() == 0  # while a is away
        assert await nodes.opened(USER, "m", 3) == ["a", second, third]
        await nodes.start("a")
        await becomes(nodes["a"], None)
        assert await nodes[third].terminated() == 0  # while a is back
        assert await nodes.opened(USER, "m", 4) == ["a", second, third, "a"]
        async with nodes["a"].peer(USER, resume=someone.told) as someone:
            await someone.send_frame("CANCEL", userId=USER, messageId="m")
            assert (await someone.end_of("m")).events[-1] == "cancelled"
        await nodes["a"].all_finished()
        await nodes.left_alone()
