"""Nodes of the previous release and of this one on one Redis: each finishes and reads replies of the other (I10)."""

import asyncio
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.keys import Keys
from tests.support.many_nodes import ManyNodes, becomes, many_nodes, standing_nodes
from tests.support.previous_release import previous_python
from tests.support.scripted_backend import event, hangs, scripted_backend, streams
from tests.support.servers import DemoBackend
from tests.support.talk import Talk, question, whole
from tests.support.waiting import wait_until

USER = 10001
ACTIVE = 3

BOTH_WAYS = pytest.mark.parametrize(("one", "other"), [("previous", "this"), ("this", "previous")])


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """One node of each release."""
    folder, pythons = tmp_path_factory.mktemp("mixed"), {"previous": previous_python()}
    with standing_nodes(folder, demo.url, "previous", "this", pythons=pythons, concurrency=ACTIVE) as nodes:
        yield nodes


@pytest.fixture
def nodes(nodes: ManyNodes) -> Iterator[ManyNodes]:
    """As in all modules; besides, no node logs an error."""
    yield nodes
    assert_no_error_is_logged(nodes)


def assert_no_error_is_logged(nodes: ManyNodes) -> None:
    """No node has logged a traceback or an error."""
    nodes.check_logs()
    for node in nodes.nodes.values():
        lines = [
            json.loads(line)
            for line in node.now.process.output().splitlines()
            if line.startswith("{") and line.endswith("}")
        ]
        assert [line for line in lines if line["level"] == "error"] == []


@BOTH_WAYS
async def test_the_answers_of_a_killed_node_are_finished_by_a_node_of_the_other_release(
    nodes: ManyNodes, one: str, other: str
) -> None:
    asked = {f"m{n}": question(80 + n, n, stall=int(n < ACTIVE)) for n in range(ACTIVE + 1)}
    *running, waiting = asked
    async with nodes[one].peer(USER) as someone:
        for message_id, text in asked.items():
            await someone.chat(USER, text, message_id)
        for message_id in running:
            await someone.some_text(message_id)
        await nodes.killed(one)
    async with nodes[other].peer(USER, resume=someone.told) as someone:
        for message_id, text in asked.items():
            assert (await someone.end_of(message_id)).text == whole(text)
            assert nodes.any.recorded(USER, message_id) == ("done", whole(text))
            assert nodes.opened_by(USER, message_id) == ([other] if message_id == waiting else [one, other])


@BOTH_WAYS
async def test_sockets_on_nodes_of_both_releases_follow_resume_and_cancel_the_same_messages(
    nodes: ManyNodes, one: str, other: str
) -> None:
    short, long = question(30), question(2000)
    async with nodes[other].peer(USER) as follower, nodes[one].peer(USER) as someone:
        await someone.chat(USER, short, "short")
        assert (await someone.end_of("short")).text == whole(short)
        assert (await follower.end_of("short")).text == whole(short)
        await someone.chat(USER, long, "long")
        told = await someone.some_text("long")
        async with nodes[other].peer(USER, resume={"long": told}) as back:
            await back.some_text("long", len(told.text) + 1)
            await back.send_frame("CANCEL", userId=USER, messageId="long")
            cancelled = await asyncio.gather(*(socket.end_of("long") for socket in (someone, follower, back)))
        assert {one.events[-1] for one in cancelled} == {"cancelled"}
        await follower.chat(USER, short, "short")  # sent again: answered from the record
        assert (await follower.end_of("short")).text == whole(short)
    assert nodes.ai_calls() == 2


async def test_mixed_releases_are_warned_about(nodes: ManyNodes) -> None:
    command = ["nodes", "--json", "--wait-settled", "--redis", nodes.server.url]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == 0, result.output
    here = version("imstream-server")
    assert json.loads(result.stdout)["warnings"] == [
        f"the nodes are of different releases (unknown on previous; {here} on this): finish the upgrade",
        "node previous does not support requests of schema 2, which wait for the others",
    ]


async def test_a_node_of_the_previous_release_ignores_pause_and_drain_and_the_commands_report_it(
    nodes: ManyNodes,
) -> None:
    async def failing(*command: str) -> str:
        on = ("--redis", nodes.server.url, "--wait", "--timeout", "1ms")
        result = await asyncio.to_thread(CliRunner().invoke, main, [*command, *on])
        assert result.exit_code == 3, result.output
        return result.stderr

    told = await failing("drain", "--node", "previous")
    assert "node previous: it has not begun to drain" in told
    assert "node previous: it is not paused: its release does not support pauses" in await failing("pause", "--all")
    await wait_until(lambda: nodes.redis.hget(Keys().status("this"), "paused"), "the other one is paused")
    async with nodes["previous"].peer(USER) as someone:
        await someone.chat(USER, question(3), "m")
        await someone.end_of("m")
    await asyncio.to_thread(CliRunner().invoke, main, ["resume", "--all", "--redis", nodes.server.url])
    assert not nodes.redis.exists(Keys().paused())


async def test_a_device_with_the_want_asked_follows_answers_of_the_previous_release_without_questions(
    nodes: ManyNodes,
) -> None:
    asked = question(30)
    async with nodes["previous"].peer(USER) as someone, nodes["this"].peer(USER) as device:
        await device.send_frame("INIT", userId=USER, wants=["asked", "status"])
        assert (await device.until(msgType="INIT"))["messages"] == []
        await someone.chat(USER, asked, "old")
        told = await device.end_of("old")
        assert (told.text, told.events[0]) == (whole(asked), "status")
        assert "asked" not in told.events
        await device.chat(USER, asked, "new")  # the previous release ignores its question
        assert (await someone.end_of("new")).text == whole(asked)
        await device.end_of("new")
        await device.send_frame("INIT", userId=USER, wants=["asked"])
        assert (await device.until(msgType="INIT"))["messages"] == [{"messageId": "new", "state": "done"}]


async def test_a_node_of_the_previous_release_answers_a_message_that_was_in_reasoning(tmp_path: Path) -> None:
    thinks = hangs(event({"choices": [{"delta": {"reasoning_content": "hm"}}]}))
    async with scripted_backend(always=streams("The ", "answer")) as backend:
        backend.then(thinks)
        pythons = {"previous": previous_python()}
        with standing_nodes(tmp_path, backend.url, "previous", "this", pythons=pythons) as nodes:
            async with nodes["previous"].peer(USER) as follower, nodes["this"].peer(USER) as someone:
                await someone.send_frame("INIT", userId=USER, wants=["status"])
                await someone.until(msgType="INIT")
                await someone.chat(USER, "why?", "m")
                await someone.until(event="status", state="thinking")
                await wait_until(lambda: "thinking" in nodes.any.record(USER, "m")[-1], "the record says so")
                await nodes.killed("this")
                assert (await follower.end_of("m")).text == "The answer"
            assert nodes.opened_by(USER, "m") == ["this", "previous"]
            assert_no_error_is_logged(nodes)


async def test_a_rolling_upgrade_and_the_way_back_lose_and_repeat_nothing(demo: DemoBackend, tmp_path: Path) -> None:
    previous = previous_python()
    limits: dict[str, Any] = {"lease": "10m", "drain_grace": "0.2s"}
    async with many_nodes(tmp_path, demo.url, "a", "b", pythons={"a": previous, "b": previous}, **limits) as nodes:
        talks = [Talk(nodes, USER + n) for n in range(10)]
        over = asyncio.Event()

        def answered() -> int:
            return sum(len(talk.texts) for talk in talks)

        async with asyncio.TaskGroup() as group:
            for talk in talks:
                group.create_task(talk.go_on(over))
            for python in (None, previous):
                for node in nodes.nodes.values():
                    before = answered()
                    await wait_until(lambda before=before: answered() > before, "answers are given")
                    assert await node.terminated() == 0
                    node.python = python
                    await node.start()
                    await becomes(node, None)
            over.set()
        for talk in talks:
            assert talk.repeated == 0
            for message_id, (asked, text) in talk.texts.items():
                assert text == whole(asked)
                assert nodes.any.recorded(talk.user, message_id) == ("done", text)
        await nodes.settled()
        assert_no_error_is_logged(nodes)
