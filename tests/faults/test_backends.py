"""Several backends behind a node: when one is away, full or broken, another answers, unnoticed by clients."""

import asyncio
import itertools
import json
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.keys import Keys
from tests.support.asking import unaccepting_port
from tests.support.backend_scripts import breaks_off, by_question
from tests.support.one_node import OneNode, one_node
from tests.support.peer import Told
from tests.support.processes import free_port
from tests.support.scripted_backend import (
    Exchange,
    Script,
    ScriptedBackend,
    chunk,
    event,
    refuses,
    says,
    scripted_backend,
    streams,
)
from tests.support.servers import RedisServer, start_demo
from tests.support.talk import question, whole
from tests.support.waiting import SLOW, wait_until

USER = 10001
Table = dict[str, Any]


def write(file: Path, **tables: Table) -> None:
    """Write a file of backends, from their names and further keys."""
    lines = list[str]()
    for name, keys in tables.items():
        lines += ["[[backend]]", *(f"{key} = {value!r}" for key, value in {"name": name, "model": "m", **keys}.items())]
    file.write_text("\n".join(lines))


@asynccontextmanager
async def node_with(
    folder: Path, redis_server: RedisServer, settings: dict[str, Any] | None = None, /, **tables: Table
) -> AsyncIterator[OneNode]:
    """A node with these backends; the URL of the last one is that of the node, for its checks."""
    file = folder / "backends.toml"
    write(file, **tables)
    url = list(tables.values())[-1]["url"]
    async with one_node(folder, redis_server, url, ai_backends=file, **(settings or {})) as node:
        yield node


def states(node: OneNode) -> dict[str, dict[str, Any]]:
    """The published states of the backends of the node."""
    found: Any = node.redis.hgetall(Keys().backends(node.name))
    return {name: json.loads(text) for name, text in found.items()}


async def command(*words: str) -> tuple[int, list[str]]:
    """Run `imstream backends …`; its exit code and the lines of its output."""
    result = await asyncio.to_thread(CliRunner().invoke, main, ["backends", *words])
    return result.exit_code, result.output.splitlines()


async def state(node: OneNode, name: str) -> dict[str, Any]:
    """The state of one backend, once it is published."""
    await wait_until(lambda: name in states(node), f"the state of {name} is published")
    return states(node)[name]


class Held:
    """A backend whose answers begin at once, and end at a signal of the test."""

    def __init__(self) -> None:
        self.running = 0
        self._over = asyncio.Semaphore(0)

    def end(self) -> None:
        """End one answer."""
        self._over.release()

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        self.running += 1
        try:
            await exchange.start()
            await exchange.send(event(chunk("begun ")))
            await self._over.acquire()
            await exchange.send(event(chunk("ended", finish_reason="stop")))
            await exchange.end()
        finally:
            self.running -= 1


async def first_delta(node: OneNode, user: int) -> float:
    """Ask, check that the answer is whole and was not repeated; the seconds until its first delta."""
    loop = asyncio.get_running_loop()
    async with node.peer(user) as someone:
        began = loop.time()
        await someone.chat(user, "hello", "m1")
        await someone.some_text("m1")
        seconds = loop.time() - began
        told = await someone.end_of("m1")
        assert (told.text, told.attempt, told.events.count("restart")) == ("All well", 1, 0)
    assert {entry["event"] for entry in node.record(user, "m1")} <= {"queued", "opened", "text", "done"}  # none waits
    return seconds


def slow_end(first: str, second: str) -> Script:
    """A script: an answer of two parts with a pause, so that its first delta is seen before its end."""

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk(first)))
        await asyncio.sleep(0.1)
        await exchange.send(event(chunk(second, finish_reason="stop")))
        await exchange.end()

    return script


@pytest.mark.parametrize("users", [12, pytest.param(100, marks=pytest.mark.long)])
async def test_with_one_of_two_backends_dead_only_one_call_in_each_pause_of_its_breaker_is_late(
    users: int, redis_server: RedisServer, tmp_path: Path
) -> None:
    connect = 2.0  # seconds
    settings = {"ai_breaker_failures": 1, "ai_breaker_pause": "2s"}
    with unaccepting_port() as port:
        async with (
            scripted_backend(always=slow_end("All ", "well")) as alive,
            node_with(
                tmp_path,
                redis_server,
                settings,
                dead={"url": f"http://127.0.0.1:{port}/v1", "connect_timeout": f"{connect}s"},
                alive={"url": alive.url, "priority": 1},
            ) as node,
        ):
            began = time.monotonic()
            waits = [await first_delta(node, USER + n) for n in range(users)]
            took = time.monotonic() - began
            late = [seconds for seconds in waits if seconds >= 0.95 * connect]  # others may wait for a busy machine
            assert late, "nobody has found out that it is dead"
            assert max(late) < connect + 1.0 * SLOW
            await wait_until(lambda: states(node).get("alive", {}).get("calls") == users, "all calls are published")
            dead = states(node)["dead"]
            assert len(late) <= dead["calls"]  # only those that have tried it
            # The pauses are 2 s, 4 s, 8 s, …, and each ends with one call.
            assert dead["calls"] <= 2 + took / 2
            assert len(late) < len(waits) / 2
            assert (dead["state"], dead["lastError"].partition(":")[0]) == ("away", "connect_timeout")
            assert node.dead() == []
            await node.settled()


async def test_a_backend_that_is_away_is_passed_over_and_called_again_when_it_is_back(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    first = ScriptedBackend(streams("All ", "well"))
    port = free_port()
    async with (
        scripted_backend(always=streams("All ", "well")) as second,
        node_with(
            tmp_path,
            redis_server,
            {"ai_breaker_failures": 3, "ai_breaker_pause": "500ms"},
            first={"url": f"http://127.0.0.1:{port}/v1"},
            second={"url": second.url, "priority": 1},
        ) as node,
    ):
        for n in range(10):
            await first_delta(node, USER + n)
        assert len(second.requests) == 10
        output = node.now.process.output()
        assert output.count("backend is away") == 1
        assert output.count("next backend is called") >= 3
        async with first.server.listening("127.0.0.1", port, grace=5):
            async with asyncio.timeout(20 * SLOW):
                while not first.requests:
                    await first_delta(node, 10100 + len(second.requests))
            await wait_until(lambda: "backend is back" in node.now.process.output(), "it is logged")
            before = len(second.requests)
            await first_delta(node, 10999)
            assert len(second.requests) == before
            await node.settled()


@pytest.mark.long
async def test_a_frozen_backend_that_accepts_connections_delays_no_message_once_its_breaker_is_open(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    limit = 2.0  # seconds
    frozen = await asyncio.to_thread(start_demo, tmp_path, "--first", "0")
    settings = {"ai_breaker_failures": 1, "ai_breaker_pause": "300ms", "retry_wait_max": "500ms"}
    limits = {"first_token_timeout": f"{limit}s", "load_timeout": f"{limit}s"}
    with frozen.process:
        async with (
            scripted_backend(always=slow_end("All ", "well")) as alive,
            node_with(
                tmp_path,
                redis_server,
                settings,
                frozen={"url": frozen.url, "model": "demo", **limits},
                alive={"url": alive.url, "priority": 1},
            ) as node,
        ):
            frozen.process.signal(signal.SIGSTOP)
            waits = [await first_delta(node, USER + n) for n in range(15)]
            assert waits[0] >= limit
            assert max(waits[1:]) < limit
            frozen.process.signal(signal.SIGCONT)
            async with asyncio.timeout(20 * SLOW):
                for n in itertools.count():
                    async with node.peer(USER + 100 + n) as someone:
                        await someone.chat(USER + 100 + n, "hello", "m1")
                        if (await someone.end_of("m1")).text != "All well":
                            break
            await node.settled()


@pytest.mark.parametrize(
    ("turns", "continues"),
    [(1, "none"), (1, "assistant"), *(pytest.param(6, how, marks=pytest.mark.long) for how in ("none", "assistant"))],
)
async def test_a_backend_killed_in_the_middle_of_answers_again_and_again_loses_no_text(
    turns: int, continues: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    options = ("--first", "0", "--continues", str(continues != "none"))
    preferred = await asyncio.to_thread(start_demo, tmp_path, *options)
    second = await asyncio.to_thread(start_demo, tmp_path, *options)
    settings = {"ai_breaker_failures": 2, "ai_breaker_pause": "200ms"}
    with second.process:
        async with node_with(
            tmp_path,
            redis_server,
            settings,
            preferred={"url": preferred.url, "model": "demo", "continue": continues},
            second={"url": second.url, "model": "demo", "continue": continues, "priority": 1},
        ) as node:
            restarts = 0
            for turn in range(turns):
                users = range(USER + 10 * turn, USER + 10 * turn + 4)
                began = asyncio.Barrier(len(users) + 1)
                async with asyncio.TaskGroup() as group:
                    asking = [group.create_task(answer(node, user, began)) for user in users]
                    await began.wait()
                    await asyncio.to_thread(preferred.process.kill)
                assert [one.result().text for one in asking] == [whole(question(60, user)) for user in users]
                restarts += sum(one.result().events.count("restart") for one in asking)
                preferred = await asyncio.to_thread(start_demo, tmp_path, *options, port=preferred.port)
                await asyncio.sleep(0.5)  # its breaker is half-open again
            with preferred.process:
                assert node.dead() == []
                assert (restarts == 0) == (continues == "assistant")
                # A cut answer is one attempt, and the next one is made at the backend that lives.
                assert {fields["attempt"] for fields in node.record(USER, "m1")} <= {"0", "1", "2"}  # 0: it was queued
                await node.settled()


async def answer(node: OneNode, user: int, began: asyncio.Barrier) -> Told:
    """Ask a long question; returns its frames. All of `began` continue when they have some of their text."""
    async with node.peer(user) as someone:
        await someone.chat(user, question(60, user), "m1")
        await someone.some_text("m1")
        await began.wait()
        return await someone.end_of("m1")


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_thousand_answers_while_the_preferred_backend_dies_and_returns_at_random(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    users, each = 40, 25
    chance = random.Random(18)  # noqa: S311 - no secret
    options = ("--first", "0", "--continues", "true")
    preferred = await asyncio.to_thread(start_demo, tmp_path, *options)
    second = await asyncio.to_thread(start_demo, tmp_path, *options)
    over = asyncio.Event()
    deaths = 0

    async def kill_and_restart() -> None:
        nonlocal preferred, deaths
        while not over.is_set():
            await asyncio.sleep(chance.uniform(0.5, 3.0))
            await asyncio.to_thread(preferred.process.kill)
            deaths += 1
            await asyncio.sleep(chance.uniform(0.0, 1.0))
            preferred = await asyncio.to_thread(start_demo, tmp_path, *options, port=preferred.port)

    async def talk(node: OneNode, user: int) -> None:
        async with node.peer(user) as someone:
            for number in range(each):
                asked, message_id = question(40, f"{user} {number}"), f"m{number}"
                assert (await someone.chat(user, asked, message_id))["code"] == "SUCCESS"
                told = await someone.end_of(message_id)
                assert (told.events[-1], told.events.count("restart")) == ("done", 0)
                assert told.text == whole(asked)

    tables: dict[str, Table] = {
        "preferred": {"url": preferred.url, "model": "demo", "continue": "assistant"},
        "second": {"url": second.url, "model": "demo", "continue": "assistant", "priority": 1},
    }
    settings = {"ai_breaker_pause": "500ms", "retry_wait_max": "2s", "queue_limit": 1000, "max_attempts": 10}
    with second.process:
        async with node_with(tmp_path, redis_server, settings, **tables) as node:
            async with asyncio.TaskGroup() as group:
                killer = group.create_task(kill_and_restart())
                talks = [group.create_task(talk(node, USER + n)) for n in range(users)]
                await asyncio.wait(talks)
                over.set()
                await killer
            with preferred.process:
                assert deaths >= 3
                assert node.dead() == []
                assert node.ended() == users * each
                await node.settled()


async def test_after_a_broken_answer_the_next_attempt_is_made_at_another_backend(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=breaks_off(event(chunk("All is")))) as breaks,
        scripted_backend(always=streams("All ", "well")) as works,
        node_with(tmp_path, redis_server, breaks={"url": breaks.url}, works={"url": works.url, "priority": 1}) as node,
    ):
        async with node.peer(USER) as someone:
            await someone.chat(USER, "hello", "m1")
            told = await someone.end_of("m1")
        assert (told.text, told.attempt) == ("All well", 2)
        assert (len(breaks.requests), len(works.requests)) == (1, 1)
        await node.settled()


async def test_a_node_reads_only_as_many_requests_as_its_backends_carry(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    large, small = Held(), Held()
    async with (
        scripted_backend(always=large) as first,
        scripted_backend(always=small) as second,
        node_with(
            tmp_path,
            redis_server,
            large={"url": first.url, "concurrency": 2},
            small={"url": second.url, "concurrency": 1, "priority": 1},
        ) as node,
        node.peer(USER) as someone,
    ):
        for n in range(5):
            await someone.chat(USER, f"question {n}", f"m{n}")
        await wait_until(lambda: (large.running, small.running) == (2, 1), "all slots are used")
        await asyncio.sleep(0.5)  # nothing more is read
        assert (len(node.pending()), node.unfinished()) == (3, 5)
        assert (await state(node, "large"))["inFlight"] == 2
        small.end()
        await wait_until(lambda: len(second.requests) == 2, "the next message takes the free slot")
        assert (large.running, small.running, len(node.pending())) == (2, 1, 3)
        for _ in range(5):
            large.end()
            small.end()
        for n in range(5):
            assert (await someone.end_of(f"m{n}")).text == "begun ended"
        assert len(first.requests) + len(second.requests) == 5


async def test_a_prompt_that_is_too_long_for_a_backend_goes_to_another(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=streams("small")) as small,
        scripted_backend(always=streams("large")) as large,
        node_with(
            tmp_path,
            redis_server,
            small={"url": small.url, "context_tokens": 1200},
            large={"url": large.url, "priority": 1},
        ) as node,
        node.peer(USER) as someone,
    ):
        await someone.chat(USER, "short", "m1")
        await someone.chat(USER, "long " * 500, "m2")
        assert (await someone.end_of("m1")).text == "small"
        assert (await someone.end_of("m2")).text == "large"


async def test_a_prompt_that_has_more_tokens_by_the_count_of_its_backend_goes_to_a_larger_one(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    body = '{"error": {"code": "context_length_exceeded", "message": "maximum context length is 1100 tokens"}}'
    async with (
        scripted_backend(always=refuses(400, body)) as small,
        scripted_backend(always=streams("large")) as large,
        node_with(
            tmp_path,
            redis_server,
            small={"url": small.url, "context_tokens": 2048},
            large={"url": large.url, "priority": 1},
        ) as node,
        node.peer(USER) as someone,
    ):
        await someone.chat(USER, "hello", "m1")
        assert (await someone.end_of("m1")).text == "large"
        assert (len(small.requests), len(large.requests)) == (1, 1)


async def test_a_long_prompt_that_waits_is_not_sent_to_a_smaller_backend_that_is_added_meanwhile(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    port = free_port()
    settings = {"ai_breaker_failures": 1, "ai_breaker_pause": "1s", "retry_wait_max": "1s", "log_format": "json"}
    large: Table = {"url": f"http://127.0.0.1:{port}/v1", "priority": 1}
    async with (
        scripted_backend(always=streams("small")) as small,
        node_with(tmp_path, redis_server, settings, large=large) as node,
        node.peer(USER) as someone,
    ):
        await someone.chat(USER, "long " * 500, "m1")
        await wait_until(lambda: "waiting" in [one["event"] for one in node.record(USER, "m1")], "it waits")
        write(tmp_path / "backends.toml", large=large, small={"url": small.url, "context_tokens": 1200})
        node.now.process.signal(signal.SIGHUP)
        await wait_until(lambda: '"what":["backends"]' in node.now.process.output(), "it is reloaded")
        async with ScriptedBackend(streams("large")).server.listening("127.0.0.1", port, grace=5):
            assert (await someone.end_of("m1")).text == "large"
        await someone.chat(USER, "short", "m2")
        assert (await someone.end_of("m2")).text == "small"


async def test_on_sighup_the_file_is_read_again_and_a_mistake_changes_nothing(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    held = Held()
    file = tmp_path / "backends.toml"
    async with (
        scripted_backend(always=by_question({"stays": [held]}, otherwise=streams("old"))) as old,
        scripted_backend(always=streams("new")) as new,
        node_with(tmp_path, redis_server, {"log_format": "json"}, old={"url": old.url}) as node,
        node.peer(USER) as someone,
    ):
        await someone.chat(USER, "stays", "m1")
        await someone.some_text("m1")
        write(file, new={"url": new.url, "weight": 0})
        node.now.process.signal(signal.SIGHUP)
        await wait_until(lambda: "backends not reloaded" in node.now.process.output(), "the mistake is logged")
        assert "backend 1 (new): weight=0 is not allowed: Input should be greater than 0" in node.now.process.output()
        await someone.chat(USER, "again", "m2")
        assert (await someone.end_of("m2")).text == "old"
        write(file, new={"url": new.url})
        node.now.process.signal(signal.SIGHUP)
        await wait_until(lambda: '"what":["backends"]' in node.now.process.output(), "it is reloaded")
        await someone.chat(USER, "and again", "m3")
        assert (await someone.end_of("m3")).text == "new"
        held.end()
        assert (await someone.end_of("m1")).text == "begun ended"
        assert len(old.requests) == 2
        await wait_until(lambda: set(states(node)) == {"new"}, "only the new one is published")
        await wait_until(lambda: not any(one.transport for one in old.server.connections), "no connection is left")


async def test_backends_are_checked_at_the_start_which_delays_nothing(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with scripted_backend(always=streams("All ", "well")) as works, scripted_backend() as refusing:
        works.models = says(b'{"data": [{"id": "other"}]}', content_type="application/json")
        refusing.models = refuses(401, '{"error": {"message": "Incorrect API key"}}')
        refusing.then(refusing.models, refusing.models)
        tables: dict[str, Table] = {"works": {"url": works.url}, "refusing": {"url": refusing.url, "priority": 1}}
        async with node_with(tmp_path, redis_server, **tables) as node:
            await first_delta(node, USER)
            await wait_until(lambda: node.now.process.output().count("backend check failed") == 2, "all are checked")
            output = node.now.process.output()
            assert "m is not in its list of models: other" in output
            assert f"{tmp_path / 'backends.toml'}, backend refusing, key_env" in output
            assert "settings of a single backend are ignored" in output  # IMSTREAM_AI_URL of the node
        code, lines = await command("--check", "--ai-backends", str(tmp_path / "backends.toml"))
        assert code == 1
        assert [line.split()[:2] for line in lines] == [["works", "model_not_found:"], ["refusing", "http_401:"]]


async def test_the_states_of_the_backends_are_shown_and_end_with_the_node(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=streams("All ", "well")) as works,
        node_with(
            tmp_path,
            redis_server,
            {"ai_breaker_failures": 1},
            away={"url": f"http://me:pass@127.0.0.1:{free_port()}/v1"},
            works={"url": works.url, "priority": 1},
        ) as node,
    ):
        await first_delta(node, USER)
        await wait_until(lambda: states(node).get("works", {}).get("calls") == 1, "the call is published")
        assert 0 < node.redis.pttl(Keys().backends("0")) <= 60_000
        _, lines = await command("--redis", node.redis_url)
        assert lines[0] == "node 0"
        assert lines[1].split()[:2] == ["away", "away"]
        assert lines[2].split()[:4] == ["last", "error", lines[2].split()[2], "s"]
        assert "connect_failed" in lines[2]
        assert lines[3].split()[:8] == ["works", "working", "0", "of", "64", "in", "flight", "1"]
        assert "pass" not in "".join(lines)
        _, lines = await command("--redis", node.redis_url, "--json")
        assert json.loads("".join(lines))["0"] == states(node)
