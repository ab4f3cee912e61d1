"""The lease decides which process runs a node; health reports of a node are true."""

import asyncio
import itertools
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from imstream.keys import Keys
from tests.support.many_nodes import becomes, many_nodes
from tests.support.one_node import OneNode, one_node
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, expected
from tests.support.waiting import wait_until

USER = 10001
LEASE = Keys().lease("0")

WEDGED = ("-m", "tests.support.wedged_node")


@asynccontextmanager
async def second_process(node: OneNode, folder: Path, **settings: object) -> AsyncIterator[OneNode]:
    """Another process with the same node id, with its own port and log."""
    await asyncio.to_thread(folder.mkdir)
    second = OneNode(folder, node.redis, node.redis_url, node.ai_url, {**node.settings, **settings}, node.name)
    await second.start(wait=False)
    with second.now.process:
        yield second


def lease_on_another_machine(node: OneNode, life: int) -> None:
    """Write a lease of a process on an unknown machine."""
    holder = {"instance": "elsewhere", "host": "far.example", "machine": "far", "pid": 1, "address": "http://far:80"}
    node.redis.set(LEASE, json.dumps(holder), px=life)


def _reads(node: OneNode) -> bool:
    """Whether it is ready for requests."""
    clients: list[dict[str, str]] = node.redis.client_list()
    return any(one["cmd"] == "xreadgroup" and "b" in one["flags"] for one in clients)


def _asked_for_life(node: OneNode) -> int:
    """Rounds of its loop without a request."""
    return int(node.redis.info("commandstats")["cmdstat_exists"]["calls"])


async def test_a_second_process_with_the_id_of_a_living_node_is_refused_and_told_by_whom(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url) as node:
        async with second_process(node, tmp_path / "second") as second:
            assert await second.died() == 1
            output = second.now.process.output()
        assert f"node 0 is run by another process ({node.now.http}, process {node.now.process.pid} on " in output
        assert "Traceback" not in output
        assert node.now.is_ready()
        async with node.peer(USER) as someone:
            await someone.chat(USER, f"still there? {AT_ONCE}", "m1")
            assert (await someone.end_of("m1")).text == expected(f"still there? {AT_ONCE}")
        await node.settled()


async def test_a_process_takes_over_at_once_from_one_that_was_killed_on_the_same_machine(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url, lease="10m") as node:
        question = "who is next? [[demo first=0 pace=10ms length=100]]"
        async with node.peer(USER) as someone:
            await someone.chat(USER, question, "m1")
            await someone.some_text("m1")
            await node.killed()
        await node.start()
        async with node.peer(USER, resume=someone.told) as someone:
            assert (await someone.end_of("m1")).text == expected(question)
        assert node.redis.pttl(LEASE) > 60_000
        await node.settled()


async def test_a_process_waits_for_a_lease_that_was_held_on_another_machine_unless_it_is_renewed_there(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url) as node:
        assert await node.terminated() == 0
        lease_on_another_machine(node, 60_000)
        await node.start(wait=False)
        await becomes(node, "the lease is not held")
        assert json.loads(str(node.redis.get(LEASE)))["instance"] == "elsewhere"
        node.redis.pexpire(LEASE, 500)
        await becomes(node, None)
        assert json.loads(str(node.redis.get(LEASE)))["pid"] == node.now.process.pid

        assert await node.terminated() == 0
        lease_on_another_machine(node, 60_000)
        await node.start(wait=False)
        await wait_until(lambda: node.now.process.output().count("waiting for the lease") == 2, "it is waiting again")
        lives = itertools.count(90_000, 1_000)

        def has_ended() -> bool:
            lease_on_another_machine(node, next(lives))  # it is renewed
            return node.now.process.process.poll() is not None

        await wait_until(has_ended, "it has given up")
        assert await node.died() == 1
        assert "(http://far:80, process 1 on far.example)" in node.now.process.output()
        node.redis.delete(LEASE)


async def test_a_node_that_cannot_renew_its_lease_takes_no_requests_until_it_can(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url, lease="1s") as node, node.peer(USER) as someone:
        node.redis.delete(LEASE)
        node.redis.lpush(LEASE, "something that is no lease")
        node.redis.expire(LEASE, 60)
        await becomes(node, "the lease is not held")
        await wait_until(lambda: not _reads(node), "its last read has ended")
        assert (await someone.chat(USER, f"are you there? {AT_ONCE}", "m1"))["event"] == "accepted"
        rounds = _asked_for_life(node)
        await wait_until(lambda: _asked_for_life(node) > rounds + 2, "its loop continues")
        assert (node.unfinished(), node.pending()) == (1, [])
        node.redis.delete(LEASE)
        await becomes(node, None)
        assert (await someone.end_of("m1")).text == expected(f"are you there? {AT_ONCE}")
        await node.all_finished()


async def test_a_node_whose_redis_hangs_lets_its_lease_go_and_comes_back_by_itself(
    demo: DemoBackend, tmp_path: Path
) -> None:
    # A time limit so long that only the lease expires.
    async with many_nodes(tmp_path, demo.url, "0", redis_timeout="5s") as nodes:
        assert nodes.server.process is not None
        nodes.server.process.signal(signal.SIGSTOP)
        await becomes(nodes["0"], "the lease is not held")
        nodes.server.process.signal(signal.SIGCONT)
        await becomes(nodes["0"], None)
        async with nodes["0"].peer(USER) as someone:
            await someone.chat(USER, f"are you there? {AT_ONCE}", "m1")
            assert (await someone.end_of("m1")).text == expected(f"are you there? {AT_ONCE}")
        await nodes.settled()


async def test_a_node_whose_consumer_loop_is_wedged_says_that_it_is_not_alive(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    short = {"redis_timeout": "200ms", "read_block": "100ms"}
    async with one_node(tmp_path, redis_server, demo.url, **short) as node:
        await node.killed()
        await node.start(command=WEDGED)
        await becomes(node, None, "/healthz")
        node.now.process.signal(signal.SIGUSR1)
        await becomes(node, "redis does not answer")
        await becomes(node, "the consumer loop is stuck", "/healthz")
        await node.killed()


@pytest.mark.long
async def test_a_node_that_stood_still_for_longer_than_all_time_limits_logs_that_and_not_a_lost_redis(
    demo: DemoBackend, tmp_path: Path
) -> None:
    async with many_nodes(tmp_path, demo.url, "0", lease="10s") as nodes:
        nodes["0"].now.process.signal(signal.SIGSTOP)
        await asyncio.sleep(16)
        nodes["0"].now.process.signal(signal.SIGCONT)
        await becomes(nodes["0"], None)
        await wait_until(lambda: "lease was lost" in nodes["0"].now.process.output(), "it logs that its lease was lost")
        output = nodes["0"].now.process.output()
        assert "event loop stood still" in output
        assert "redis lost" not in output
        await nodes.settled()


async def test_a_node_that_was_frozen_past_its_lease_says_nothing_more_and_its_client_gets_one_answer(
    demo: DemoBackend, tmp_path: Path
) -> None:
    question = "are you cold? [[demo first=0 pace=10ms length=200]]"
    async with many_nodes(tmp_path, demo.url, "a", "b", sweep_interval="1m") as nodes:
        for thawed in ("while-another-answers", "after-another-has-answered"):
            async with nodes["a"].peer(USER) as someone:
                await someone.chat(USER, question, thawed)
                await someone.some_text(thawed, 60)
                nodes["a"].now.process.signal(signal.SIGSTOP)
                assert await nodes.opened(USER, thawed, 2) == ["a", "b"]
                if thawed == "after-another-has-answered":
                    await nodes["a"].all_finished()
                nodes["a"].now.process.signal(signal.SIGCONT)
                told = await someone.end_of(thawed)
            assert told.text == expected(question)
            assert told.events.count("restart") == 1
            await nodes["a"].all_finished()
            assert nodes.any.recorded(USER, thawed) == ("done", told.text)
            await becomes(nodes["a"], None)
        assert nodes.ai_calls() == 4
        output = nodes["a"].now.process.output()
        assert "redis lost" not in output, "the node was frozen, not Redis"
        assert output.count("lease was lost and is held again") + output.count("lease held again") >= 2
        await nodes.settled()
