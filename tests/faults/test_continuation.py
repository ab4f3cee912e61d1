"""An answer is interrupted by its backend or its node: it continues where it was, and equals an uninterrupted one."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.backend_scripts import breaks_off, by_question, continues
from tests.support.many_nodes import ManyNodes, becomes, many_nodes, standing_nodes
from tests.support.one_node import one_node
from tests.support.peer import Told, answered
from tests.support.previous_release import previous_python
from tests.support.scripted_backend import chunk, event, refuses, scripted_backend, streams
from tests.support.servers import DemoBackend, RedisServer, start_demo
from tests.support.talk import question, whole
from tests.support.tiers import examples
from tests.support.waiting import wait_until

USER = 10001
CONTINUES: dict[str, Any] = {"ai_continue": "assistant"}
TEXTS = ("Nothing ", "is ", "lost, ", "一个字", "都不丢 😀")
ANSWER = "".join(TEXTS)


@pytest.fixture(scope="module")
def continuing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoBackend]:
    """A demo backend that continues answers."""
    backend = start_demo(tmp_path_factory.mktemp("demo"), "--pace", "5ms", "--continues", "true")
    with backend.process:
        yield backend


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, continuing: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes. Sweeps are so rare that no test depends on one."""
    folder = tmp_path_factory.mktemp("continuing")
    with standing_nodes(folder, continuing.url, "a", "b", sweep_interval="1m", **CONTINUES) as nodes:
        yield nodes


async def test_an_answer_that_is_cut_anywhere_is_never_restarted(redis_server: RedisServer, tmp_path: Path) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    cuts = {f"m{at}": at for at in range(len(ANSWER), 0, -examples(1, first=6))}
    scripts = {
        name: [
            continues(*TEXTS, until=at, usage=usage),
            continues(*TEXTS, until=min(at + 3, len(ANSWER)), usage=usage),
            continues(*TEXTS, usage=usage),
        ]
        for name, at in cuts.items()
    }
    async with (
        scripted_backend(always=by_question(scripts)) as backend,
        one_node(tmp_path, redis_server, backend.url, ai_breaker_failures=1000, **CONTINUES) as node,
    ):
        async with node.peer(USER) as someone:
            for message_id in cuts:
                await someone.chat(USER, message_id, message_id)
            for message_id, at in cuts.items():
                told = await someone.end_of(message_id)
                assert (told.text, told.events.count("restart"), told.attempt) == (ANSWER, 0, 1), message_id
                assert told.terminal is not None
                calls = 2 if at == len(ANSWER) else 3  # a call that sends nothing reports nothing
                assert told.terminal["usage"] == {name: calls * count for name, count in usage.items()}
        for message_id in cuts:
            assert node.recorded(USER, message_id) == ("done", ANSWER)
        await node.settled()


async def test_the_user_of_a_killed_node_keeps_the_text_and_gets_the_rest_from_another(nodes: ManyNodes) -> None:
    asked = question(120, stall=1)
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, asked, "m1")
        told = await someone.some_text("m1", 200)
        await nodes.killed("a")
    assert whole(asked).startswith(told.text)
    # Clients that have received any part of it.
    parts = [Told(text=told.text[:at], attempt=1, offset=at, events=["delta"]) for at in range(0, len(told.text), 30)]
    readers = [asyncio.create_task(_read_rest(nodes, part)) for part in parts]
    async with nodes["b"].peer(USER, resume={"m1": told}) as someone:
        told = await someone.end_of("m1")
    assert told.text == whole(asked)
    [_, opened] = [entry for entry in nodes.any.record(USER, "m1") if entry["event"] == "opened"]
    assert (opened["by"], opened["wire"]) == ("b", "2")
    known = int(opened["offset"])
    assert 0 < known < len(whole(asked))
    for part, reader in zip(parts, readers, strict=True):
        end = await reader
        assert end.text == whole(asked)
        assert end.events.count("restart") == (0 if part.offset <= known else 1)
        assert end.attempt == (1 if part.offset <= known else 2)
    assert nodes.any.recorded(USER, "m1") == ("done", whole(asked))
    assert nodes.ai_calls() == 2


async def _read_rest(nodes: ManyNodes, part: Told) -> Told:
    async with nodes["b"].peer(USER, resume={"m1": part}) as someone:
        return await someone.end_of("m1")


@pytest.mark.long
async def test_a_node_that_drains_hands_over_the_text_so_far(continuing: DemoBackend, tmp_path: Path) -> None:
    asked = question(250)
    limits: dict[str, Any] = {"lease": "10m", "drain_grace": "0.1s", **CONTINUES}
    async with many_nodes(tmp_path, continuing.url, "a", "b", **limits) as nodes:
        async with nodes["a"].peer(USER) as someone:
            await someone.chat(USER, asked, "m1")
            await someone.some_text("m1", 100)
            nodes["a"].now.process.signal(signal.SIGTERM)
            assert await someone.closed() == 1012
        async with nodes["b"].peer(USER, resume=someone.told) as someone:
            told = await someone.end_of("m1")
        assert (told.text, told.events.count("restart")) == (whole(asked), 0)
        assert await nodes["a"].died() == 0
        assert nodes.any.recorded(USER, "m1") == ("done", whole(asked))
        assert nodes.opened_by(USER, "m1") == ["a", "b"]
        await nodes.settled()


@pytest.mark.long
async def test_a_node_that_was_frozen_past_its_lease_shows_the_answer_that_another_continues(
    continuing: DemoBackend, tmp_path: Path
) -> None:
    asked = question(250)
    async with many_nodes(tmp_path, continuing.url, "a", "b", sweep_interval="1m", **CONTINUES) as nodes:
        for thawed in ("while-another-answers", "after-another-has-answered"):
            async with nodes["a"].peer(USER) as someone:
                await someone.chat(USER, asked, thawed)
                await someone.some_text(thawed, 200)
                nodes["a"].now.process.signal(signal.SIGSTOP)
                assert await nodes.opened(USER, thawed, 2) == ["a", "b"]
                if thawed == "after-another-has-answered":
                    await nodes["a"].all_finished()
                nodes["a"].now.process.signal(signal.SIGCONT)
                told = await someone.end_of(thawed)
            assert told.text == whole(asked)
            assert told.events.count("restart") <= 1  # it may have shown more than was recorded
            assert nodes.any.recorded(USER, thawed) == ("done", told.text)
            [_, opened] = [entry for entry in nodes.any.record(USER, thawed) if entry["event"] == "opened"]
            assert int(opened["offset"]) > 0
            await becomes(nodes["a"], None)
        await nodes.settled()


async def test_a_client_that_moves_while_its_answer_is_cut_and_continued_notices_nothing(nodes: ManyNodes) -> None:
    asked = question(250).replace("[[demo ", "[[demo break=2 ")
    told = Told()
    for name, length in (("a", 300), ("b", len(whole(asked)) // 2 + 50), ("a", len(whole(asked)) * 3 // 4 + 50)):
        async with nodes[name].peer(USER, resume={"m1": told} if told.events else None) as someone:
            if not told.events:
                await someone.chat(USER, asked, "m1")
            told = await someone.some_text("m1", length)
    async with nodes["b"].peer(USER, resume={"m1": told}) as someone:
        told = await someone.end_of("m1")
    assert (told.text, told.events.count("restart"), told.attempt) == (whole(asked), 0, 1)
    assert nodes.opened_by(USER, "m1") == ["a", "a", "a"]
    assert nodes.any.recorded(USER, "m1") == ("done", whole(asked))


@pytest.mark.long
async def test_a_backend_that_is_killed_again_and_again_goes_on_when_it_is_back(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    asked = question(300)
    backend = start_demo(tmp_path, "--continues", "true")
    try:
        async with one_node(tmp_path, redis_server, backend.url, retry_wait_max="200ms", **CONTINUES) as node:
            async with node.peer(USER) as someone:
                await someone.chat(USER, asked, "m1")
                for length in (150, 400):
                    await someone.some_text("m1", length)
                    await asyncio.to_thread(backend.process.kill)
                    backend = await asyncio.to_thread(start_demo, tmp_path, "--continues", "true", port=backend.port)
                told = await someone.end_of("m1")
            assert (told.text, told.events.count("restart")) == (whole(asked), 0)
            assert node.recorded(USER, "m1") == ("done", whole(asked))
    finally:
        await asyncio.to_thread(backend.process.__exit__, None, None, None)


async def test_a_backend_that_does_not_continue_after_all_answers_from_the_beginning(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with scripted_backend() as backend:
        refusal = refuses(400, '{"error": {"message": "the last message must be of the user"}}')
        backend.then(breaks_off(event(chunk("Half of a wrong "))), refusal, streams(*TEXTS))
        async with one_node(tmp_path, redis_server, backend.url, **CONTINUES) as node:
            async with node.peer(USER) as someone:
                await someone.chat(USER, "hello", "m1")
                told = await someone.end_of("m1")
            assert (told.text, told.events.count("restart")) == (ANSWER, 1)
            assert node.recorded(USER, "m1") == ("done", ANSWER)
            await node.settled()


@pytest.mark.long
async def test_a_node_of_the_previous_release_reads_and_finishes_answers_that_this_one_continues(
    continuing: DemoBackend, tmp_path: Path
) -> None:
    asked = question(300)
    pythons = {"previous": previous_python()}
    async with many_nodes(tmp_path, continuing.url, "this", "previous", pythons=pythons, **CONTINUES) as nodes:
        broken = asked.replace("[[demo ", "[[demo break=1 ")
        async with nodes["this"].peer(USER) as someone, nodes["previous"].peer(USER) as reader:
            await someone.chat(USER, broken, "m1")
            await someone.some_text("m1", len(whole(broken)) // 2 + 100)  # continued, for the first time
            told = await reader.some_text("m1", len(whole(broken)) // 2 + 50)
            assert (someone.told["m1"].attempt, told.attempt) == (1, 2)
            async with nodes["this"].peer(USER, resume={"m1": told}) as back:  # it moves to a node of this release
                again = await back.some_text("m1", len(told.text) + 1)
                assert (again.attempt, again.events.count("restart")) == (2, told.events.count("restart"))
            await nodes["this"].killed()
            assert (await reader.end_of("m1")).text == whole(broken)  # which begins again
        assert nodes.any.recorded(USER, "m1") == ("done", whole(broken))
        assert nodes.opened_by(USER, "m1") == ["this", "this", "previous"]


@pytest.mark.long
async def test_this_release_continues_answers_that_a_node_of_the_previous_one_began(
    continuing: DemoBackend, tmp_path: Path
) -> None:
    asked = question(200)
    pythons = {"previous": previous_python()}
    async with many_nodes(tmp_path, continuing.url, "previous", "this", pythons=pythons, **CONTINUES) as nodes:
        async with nodes["previous"].peer(USER) as someone:
            await someone.chat(USER, asked, "m1")
            told = await someone.some_text("m1", 100)
            await wait_until(lambda: any("text" in entry for entry in nodes.any.record(USER, "m1")), "it is recorded")
            await nodes["previous"].killed()
        async with nodes["this"].peer(USER, resume={"m1": told}) as someone:
            told = await someone.end_of("m1")
        assert told.text == whole(asked)
        [_, opened] = [entry for entry in nodes.any.record(USER, "m1") if entry["event"] == "opened"]
        assert 0 < int(opened["offset"]) < len(whole(asked))


def write_backends(file: Path, *backends: tuple[str, str]) -> None:
    """Write a file of backends, from their URLs and how they continue; the first one is preferred."""
    file.write_text(
        "".join(
            f'[[backend]]\nname = "b{number}"\nurl = "{url}"\nmodel = "m"\ncontinue = "{how}"\npriority = {number}\n'
            for number, (url, how) in enumerate(backends)
        )
    )


@pytest.mark.long
async def test_while_the_preferred_backend_is_killed_again_and_again_another_one_continues_unnoticed(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    asked = {f"m{n}": question(60 + n, n) for n in range(80)}
    first, second = [await asyncio.to_thread(start_demo, tmp_path, "--continues", "true") for _ in range(2)]
    file = tmp_path / "backends.toml"
    write_backends(file, (first.url, "assistant"), (second.url, "assistant"))
    try:
        async with one_node(tmp_path, redis_server, second.url, ai_backends=file, ai_breaker_pause="200ms") as node:
            asking = asyncio.create_task(answered(node.now.ws(USER).partition("?")[0], USER, asked))
            for ended in (5, 20, 35, 50):
                await wait_until(lambda ended=ended: node.ended() >= ended, "answers have ended", limit=30)
                await asyncio.to_thread(first.process.kill)
                first = await asyncio.to_thread(start_demo, tmp_path, "--continues", "true", port=first.port)
            told = await asking
            for message_id, one in told.items():
                assert (one.text, one.events.count("restart")) == (whole(asked[message_id]), 0)
                assert one.events[-1] == "done"
                assert node.recorded(USER, message_id) == ("done", one.text)
            records = [node.record(USER, message_id) for message_id in asked]
            assert any("wire" in entry for record in records for entry in record), "answers were cut"
            await node.all_finished()
    finally:
        for backend in (first, second):
            await asyncio.to_thread(backend.process.__exit__, None, None, None)


@pytest.mark.parametrize("option", ["prefix", "none"])
async def test_another_backend_goes_on_with_the_text_or_begins_again_where_it_cannot(
    redis_server: RedisServer, tmp_path: Path, option: str
) -> None:
    usage = {"total_tokens": 2}
    async with scripted_backend() as first, scripted_backend() as second:
        first.then(continues(*TEXTS, until=len("Nothing is "), usage=usage), refuses(503))
        second.then(continues(*TEXTS, usage=usage))
        file = tmp_path / "backends.toml"
        write_backends(file, (first.url, "assistant"), (second.url, option))
        async with one_node(tmp_path, redis_server, first.url, ai_backends=file) as node:
            async with node.peer(USER) as someone:
                await someone.chat(USER, "hello", "m1")
                told = await someone.end_of("m1")
            restarts = 1 if option == "none" else 0
            assert (told.text, told.events.count("restart")) == (ANSWER, restarts)
            assert told.terminal is not None
            assert told.terminal["usage"] == {"total_tokens": 4 - 2 * restarts}
            [request] = second.requests
            assert request.json["messages"][-1].get("prefix") == (True if option == "prefix" else None)
            assert node.recorded(USER, "m1") == ("done", ANSWER)
            await node.settled()
