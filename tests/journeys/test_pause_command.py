"""`imstream pause` and `resume`: a pause as seen by users, operators and other nodes."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from imstream.keys import Keys
from tests.support.documents import redis_cli
from tests.support.many_nodes import ManyNodes, why_not
from tests.support.redis_sets import Topology
from tests.support.talk import question, whole
from tests.support.waiting import wait_until

KEYS = Keys()
USER = 10001


def run(command: str, on: Topology, *options: str) -> Result:
    return CliRunner().invoke(main, [command, "--redis", on.url, *options])


async def ordered(command: str, on: Topology, *options: str) -> dict[str, Any]:
    """Run a command that succeeds, with `--json`."""
    result = await asyncio.to_thread(run, command, on, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def metrics(nodes: ManyNodes, name: str) -> list[str]:
    with urllib.request.urlopen(f"{nodes[name].now.http}/metrics", timeout=5) as answer:  # noqa: S310 - a URL of the test's own
        return [line for line in answer.read().decode().splitlines() if line.startswith("imstream_paused")]


@pytest.fixture
def nodes(pair: ManyNodes) -> Iterator[ManyNodes]:
    yield pair
    pair.redis.delete(KEYS.paused())


async def test_during_a_pause_messages_wait_sockets_stay_and_the_reason_is_shown(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as someone:
        await someone.send_frame("INIT", userId=USER, wants=["status"])
        await someone.chat(USER, question(150), "1st")
        await someone.some_text("1st")
        paused = await ordered("pause", nodes.server, "--all", "--reason", "new weights", "--by", "ann")
        assert [(one["node"], one["paused"]) for one in paused["nodes"]] == [
            ("a", "new weights, by ann"),
            ("b", "new weights, by ann"),
        ]
        assert (await someone.chat(USER, question(3), "2nd"))["event"] == "accepted"
        queued = await someone.until(event="status", messageId="2nd")
        assert (queued["state"], queued["position"], queued["reason"]) == ("queued", 1, "paused")
        assert "etaMs" not in queued
        assert why_not(nodes["a"], "/readyz") is None
        assert metrics(nodes, "a") == ['imstream_paused{stream="a"} 1.0']
        listed = (await asyncio.to_thread(run, "nodes", nodes.server)).output
        assert [line.split()[1] for line in listed.splitlines()[1:3]] == ["paused", "paused"]
        assert "warning: node a is paused: new weights, by ann" in listed
        why = (await asyncio.to_thread(run, "streams", nodes.server, "--node", "a")).output
        assert "an operator has paused the node: new weights, by ann" in why
        waited = await ordered("pause", nodes.server, "--all", "--reason", "new weights", "--wait")
        assert {one["running"] for one in waited["nodes"]} == {0}  # the first answer is complete
        assert (await someone.end_of("1st")).text == whole(question(150))
        assert nodes.ai_calls() == 1
        resumed = await ordered("resume", nodes.server, "--all")
        assert [one["paused"] for one in resumed["nodes"]] == [None, None]
        assert (await someone.end_of("2nd")).text == whole(question(3))
    assert metrics(nodes, "a") == ['imstream_paused{stream="a"} 0.0']
    log = nodes["a"].now.process.log.read_text("utf-8")
    assert log.index("paused by an operator") < log.index("pause ended")


async def test_with_refuse_new_messages_get_busy_and_cost_nothing(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER, lang="en") as someone, nodes["b"].peer(USER + 1) as other:
        await ordered("pause", nodes.server, "--node", "a", "--refuse")
        refused = await someone.chat(USER, "hello", "m")
        assert (refused["code"], refused["contents"]) == (
            "BUSY",
            "The service is being maintained, please send it again later!",
        )
        assert refused["retryAfterMs"] > 0
        await other.chat(USER + 1, question(3), "m")
        await other.end_of("m")  # the other node is not paused
        await ordered("resume", nodes.server, "--node", "a")
        await someone.chat(USER, question(3), "m")
        await someone.end_of("m")


async def test_a_pause_survives_a_restart_and_no_other_node_answers_waiting_messages(nodes: ManyNodes) -> None:
    await ordered("pause", nodes.server, "--node", "a")
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, question(3), "m")
        told = someone.told
    await nodes.killed("a")
    await wait_until(lambda: nodes.redis.get(KEYS.adopter("a")) == "b", "the other node has adopted the stream")
    await wait_until(lambda: 'imstream_paused{stream="a"} 1.0' in metrics(nodes, "b"), "and shows that it is paused")
    assert [one["unfinished"] for one in (await ordered("nodes", nodes.server))["nodes"]] == [1, 0]
    await nodes.start("a")
    await wait_until(lambda: nodes.redis.get(KEYS.adopter("a")) is None, "its stream is its own again")
    assert nodes.ai_calls() == 0
    async with nodes["a"].peer(USER, resume=told) as someone:
        await ordered("resume", nodes.server, "--node", "a")
        await someone.end_of("m")
    assert nodes.opened_by(USER, "m") == ["a"]


async def test_a_paused_node_adopts_nothing_so_that_others_can(nodes: ManyNodes) -> None:
    await ordered("pause", nodes.server, "--node", "b")
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, question(300), "m")
        await someone.some_text("m")
        told = someone.told
    await nodes.killed("a")
    await wait_until(lambda: nodes.holder("a") is None, "the lease has ended")
    await asyncio.sleep(1)  # three scans
    assert nodes.redis.get(KEYS.adopter("a")) is None
    async with nodes["b"].peer(USER, resume=told) as someone:
        await ordered("resume", nodes.server, "--node", "b")
        await someone.end_of("m")
    assert await nodes.opened(USER, "m", 2) == ["a", "b"]


async def test_redis_cli_does_the_same(nodes: ManyNodes) -> None:
    def is_paused() -> bool:
        return 'imstream_paused{stream="a"} 1.0' in metrics(nodes, "a")

    redis_cli("Pause", nodes.server, {}, until="HGETALL")
    await wait_until(is_paused, "the node is paused")
    told = redis_cli("Pause", nodes.server, {}, since="HGETALL")
    assert told["HGETALL im:paused"][0] == "*"
    await wait_until(lambda: not is_paused(), "the pause has ended")


def test_missing_confirmations_are_reported(empty_redis: Topology) -> None:
    with empty_redis.client() as client:
        lease = json.dumps({"instance": "i", "host": "h", "machine": "", "pid": 7, "address": "http://h:1"})
        for node in ("busy", "old"):
            client.zadd(KEYS.nodes(), {node: 1})
            client.set(KEYS.lease(node), lease, ex=60)
        status = {"instance": "i", "version": "9", "running": 2, "paused": "why"}
        client.hset(KEYS.status("busy"), mapping=status)
        result = run("pause", empty_redis, "--node", "busy", "--node", "new", "--wait", "--timeout", "1ms")
        assert result.exit_code == 3
        assert result.stdout.splitlines() == [
            "node new is paused, but has not run yet",
            "node busy is paused: why; it works on 2 requests, 0 are unfinished",
        ]
        assert result.stderr.splitlines()[-1] == "not confirmed: node busy: it works on 2 requests"
        old = run("pause", empty_redis, "--node", "old", "--wait", "--timeout", "1ms")
        assert "not confirmed: node old: it is not paused: its release does not support pauses" in old.stderr
        every = run("pause", empty_redis, "--all", "--reason", "why", "--wait", "--timeout", "1ms")
        assert every.stdout.splitlines()[0].startswith("node busy is paused")  # and not: all nodes are
        still = run("resume", empty_redis, "--node", "busy", "--node", "new")
        assert (still.exit_code, still.stdout) == (3, "the pause of all nodes continues\n")
        assert still.stderr.splitlines()[-1].startswith("not confirmed: all nodes are paused: why")
        assert client.hkeys(KEYS.paused()) == ["old", "*"]
        client.hset(KEYS.status("busy"), "paused", "")
        assert run("resume", empty_redis, "--node", "busy").exit_code == 3  # before it has read the pause
        assert run("resume", empty_redis, "--all").stdout.splitlines() == [
            "all nodes are resumed",
            "node busy is running; it works on 2 requests, 0 are unfinished",
            "node old is running, 0 are unfinished",
        ]
        assert run("resume", empty_redis, "--node", "new").stdout == "node new is resumed, but has not run yet\n"
    for wrong in ([], ["--all", "--node", "a"], ["--node", "*"]):
        assert run("pause", empty_redis, *wrong).exit_code == 2
