"""An operator retries dead letters: the answer, on nodes and with clients of this release and the previous."""

import asyncio
import json
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.client import Client, Failed, Reply
from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.peer import Told
from tests.support.previous_release import previous_python
from tests.support.scripted_backend import chunk, event, refuses, says, scripted_backend, streams
from tests.support.waiting import SLOW, wait_until

USER = 10001
BREAKS = says(event(chunk("half")))
"""An answer that is cut."""

OLD_CLIENT = """
import asyncio, sys
from imstream.client import Client, Failed

async def main(url):
    async with Client(url, 10001) as client:
        try:
            await (await client.send("why?", message_id="m")).text()
        except Failed:
            print("failed", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(await (await client.send("why?", message_id="m2")).text())
        print(await (await client.send("why?", message_id="m")).text())

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def nodes_whose_backend_fails_once(folder: Path, *names: str, **pythons: str) -> AsyncIterator[ManyNodes]:
    async with scripted_backend(always=streams("The ", "answer")) as backend:
        backend.then(refuses(400, '{"error": {"message": "no"}}') if pythons else BREAKS)
        with standing_nodes(folder, backend.url, *names, pythons=pythons, max_attempts=1) as nodes:
            yield nodes
        if not pythons:
            nodes.check_logs()


async def retried(nodes: ManyNodes, *options: str) -> str:
    """The result of `imstream dead retry` for the letter of node a."""
    await wait_until(lambda: len(nodes["a"].dead()) == 1, "the request is buried")
    command = ["dead", "retry", "--json", "--redis", nodes.server.url, *options]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == 0, result.output
    return str(json.loads(result.output)["outcome"])


async def failed(reply: Reply) -> None:
    with pytest.raises(Failed):
        await reply.text()


def events(nodes: ManyNodes) -> list[str]:
    return [entry["event"] for entry in nodes.any.record(USER, "m")]


async def test_open_sockets_on_all_nodes_see_the_answer_after_failed_and_later_devices_find_it(tmp_path: Path) -> None:
    async with nodes_whose_backend_fails_once(tmp_path, "a", "b") as nodes:
        async with nodes["a"].peer(USER) as someone, nodes["b"].peer(USER) as device:
            await someone.chat(USER, "why?", "m")
            for socket in (someone, device):
                told = await socket.end_of("m")
                assert (told.text, told.events[-1]) == ("half", "failed")
            assert await retried(nodes, "--all") == "retried"
            for socket in (someone, device):
                await socket.until(event="restart", messageId="m")
                told = await socket.end_of("m")
                assert (told.text, told.events[-1]) == ("The answer", "done")
                assert told.events.count("restart") == 1
            await someone.chat(USER, "why?", "m")  # sent again: answered from the record
            assert (await someone.end_of("m")).text == "The answer"
        async with nodes["b"].peer(USER, resume={"m": Told()}) as later:
            told = await later.end_of("m")
            assert (told.text, told.events[-1]) == ("The answer", "done")
        steps = [name for name in events(nodes) if name not in {"queued", "text"}]
        assert steps == ["opened", "failed", "reopened", "opened", "done"]
        assert nodes["a"].dead() == []
        await wait_until(lambda: nodes["a"].unfinished() == 0, "its requests are removed")


@pytest.mark.long
async def test_a_letter_of_a_dead_node_is_answered_by_the_one_that_adopts_its_stream(tmp_path: Path) -> None:
    async with nodes_whose_backend_fails_once(tmp_path, "a", "b") as nodes:
        async with nodes["a"].peer(USER) as someone:
            await someone.chat(USER, "why?", "m")
            await someone.end_of("m")
        await wait_until(lambda: len(nodes["a"].dead()) == 1, "the request is buried")
        await nodes.killed("a")
        assert await retried(nodes, "--node", "a", "--user", str(USER)) == "retried"
        await wait_until(lambda: events(nodes)[-1] == "done", "it is answered")
        assert nodes.opened_by(USER, "m") == ["a", "b"]


async def test_the_python_client_reports_that_a_failed_message_continues(tmp_path: Path) -> None:
    reopened = asyncio.Queue[Reply]()
    async with (
        nodes_whose_backend_fails_once(tmp_path, "a") as nodes,
        Client(nodes.urls(), USER, on_reopened=reopened.put_nowait) as client,
    ):
        reply = await client.send("why?", message_id="m")
        await failed(reply)
        assert await retried(nodes, "--node", "a") == "retried"
        async with asyncio.timeout(10 * SLOW):
            assert await reopened.get() is reply
            assert await reply.text() == "The answer"


@pytest.mark.long
async def test_a_client_of_the_previous_release_goes_on_showing_failed(tmp_path: Path) -> None:
    async with nodes_whose_backend_fails_once(tmp_path, "a") as nodes:
        command = (previous_python(), "-P", "-c", OLD_CLIENT, nodes["a"].now.ws())
        client = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        assert client.stdout is not None
        async with asyncio.timeout(20 * SLOW):
            assert await client.stdout.readline() == b"failed\n"
            assert await retried(nodes, "--node", "a") == "retried"
            await wait_until(lambda: events(nodes)[-1] == "done", "it is answered")
            output, _ = await client.communicate(b"\n")
        assert output.decode().split("\n") == ["The answer", "The answer", ""]
        assert client.returncode == 0


@pytest.mark.long
async def test_nothing_is_retried_while_a_node_of_the_previous_release_runs(tmp_path: Path) -> None:
    previous = previous_python()
    async with nodes_whose_backend_fails_once(tmp_path, "a", a=previous) as nodes:
        async with nodes["a"].peer(USER) as someone:
            await someone.chat(USER, "why?", "m")
            assert (await someone.end_of("m")).events[-1] == "failed"
        await wait_until(lambda: len(nodes["a"].dead()) == 1, "the request is buried")
        command = ["dead", "retry", "--node", "a", "--redis", nodes.server.url]
        refused = await asyncio.to_thread(CliRunner().invoke, main, command)
        assert refused.exit_code == 1
        assert "runs on node a: upgrade" in refused.output
        assert len(nodes["a"].dead()) == 1

        for python in (None, previous):  # an upgrade, and the way back
            assert await nodes["a"].terminated() == 0
            nodes["a"].python = python
            await nodes["a"].start()
            if python is None:
                assert await retried(nodes, "--node", "a") == "retried"
                await wait_until(lambda: events(nodes)[-1] == "done", "it is answered")
            async with nodes["a"].peer(USER, resume={"m": Told()}) as later:
                told = await later.end_of("m")
                assert (told.text, told.events[-1]) == ("The answer", "done")
