"""`imstream nodes`: living, dead and older nodes, and when a rolling restart may continue."""

import asyncio
import json
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from imstream.keys import GROUP, Keys
from imstream.redis.client import to_dict
from tests.support.documents import redis_cli
from tests.support.many_nodes import ManyNodes, becomes, standing_nodes
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole
from tests.support.waiting import wait_until

KEYS = Keys()
USER = 10001


def look(on: Topology, *options: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["nodes", "--redis", on.url, *options])


def shown(on: Topology, *options: str) -> dict[str, Any]:
    """Its output with `--json`."""
    result = look(on, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def nodes(pair: ManyNodes) -> ManyNodes:
    return pair


async def test_every_node_is_shown_with_its_release_its_sockets_and_its_work(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, question(20_000), "m")

        def a_works() -> bool:
            [a, _] = shown(nodes.server)["nodes"]
            return bool(a["sessions"] == a["running"] == a["unfinished"] == 1)

        await wait_until(lambda: asyncio.to_thread(a_works), "the next renewal of the lease tells it")
        [a, b] = (found := await asyncio.to_thread(shown, nodes.server))["nodes"]
        assert (a["node"], a["state"], a["version"], a["not_ready"]) == ("a", "running", version("imstream-server"), "")
        assert a["address"] == nodes["a"].now.http
        assert a["pid"] == nodes["a"].now.process.pid
        assert 0 < a["oldest"] < 60
        assert (b["unfinished"], b["oldest"], b["adopter"]) == (0, None, None)
        assert found["warnings"] == []
        text = (await asyncio.to_thread(look, nodes.server)).output
        assert [line.split()[:2] for line in text.splitlines()] == [
            ["node", "state"],
            ["a", "running"],
            ["b", "running"],
        ]
        await someone.send_frame("CANCEL", userId=USER, messageId="m")
        await someone.end_of("m")


async def test_redis_cli_shows_the_same(nodes: ManyNodes) -> None:
    [a, _] = (await asyncio.to_thread(shown, nodes.server))["nodes"]
    told = redis_cli("Nodes and rolling restarts", nodes.server, {"node:0": "node:a"})
    assert sorted(told["ZRANGE im:nodes 0 -1 WITHSCORES"][::2]) == ["a", "b"]  # by their last beats
    assert json.loads(told["GET im:{node:0}:lease"])["address"] == a["address"]
    assert told["PTTL im:{node:0}:lease"] > 0
    assert to_dict(told["HGETALL im:{node:0}:status"])["version"] == a["version"]
    assert told["GET im:{node:0}:adopter"] is a["adopter"] is None
    assert told["XLEN im:{node:0}:requests"] == a["unfinished"] == 0
    assert told["XRANGE im:{node:0}:requests - + COUNT 1"] == []
    assert told["XPENDING im:{node:0}:requests workers"][0] == 0


async def test_the_next_node_may_be_stopped_when_the_last_one_is_back_and_nothing_is_adopted(nodes: ManyNodes) -> None:
    assert (await asyncio.to_thread(shown, nodes.server, "--wait-settled"))["unsettled"] == []
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, question(400), "m")
        await someone.some_text("m")
        await nodes.killed("a")
        assert await nodes.opened(USER, "m", 2) == ["a", "b"]
    result = await asyncio.to_thread(look, nodes.server, "--wait-settled", "--timeout", "100ms")
    assert result.exit_code == 3
    assert "not settled: node a: no process runs it\n" in result.stderr
    assert "if they stay away: --except a\n" in result.stderr
    assert "not settled: node a: node b has adopted its stream\n" in result.stderr
    assert "a     dead" in result.stdout
    await nodes.start("a")
    waited = await asyncio.to_thread(look, nodes.server, "--wait-settled", "--timeout", "1m")
    assert waited.exit_code == 0, waited.output
    assert nodes.any.recorded(USER, "m") == ("done", whole(question(400)))


def test_nodes_of_other_releases_foreign_values_and_gaps_are_shown_with_every_topology_of_redis(
    empty_redis: Topology,
) -> None:
    assert "no node has run with redis" in look(empty_redis).output
    with empty_redis.client() as client:
        client.zadd(KEYS.nodes(), {"new": 1, "old": 2, "gone": 3, "no node": 4})
        lease = json.dumps({"instance": "i", "host": "h", "machine": "", "pid": 7, "address": "http://h:1"})
        for node in ("new", "old"):
            client.set(KEYS.lease(node), lease, ex=60)
        status = {"instance": "i", "version": "9", "sessions": 3, "running": "x", "not_ready": "draining"}
        client.hset(KEYS.status("new"), mapping=status)
        client.hset(KEYS.status("old"), mapping=status | {"instance": "the one before"})
        client.xadd(KEYS.requests("gone"), {"user": "1"}, id="1-0")
        client.xgroup_create(KEYS.requests("gone"), GROUP, "0")
        client.xreadgroup(GROUP, "old", {KEYS.requests("gone"): ">"})
        found = shown(empty_redis)
        assert [one["node"] for one in found["nodes"]] == ["gone", "new", "old"]
        assert found["warnings"] == [
            "node gone is dead, and no node has adopted its 1 requests yet",
            "node old works on 1 requests of node gone",
            "node new is not ready: draining",
            "the nodes are of different releases (9 on new; unknown on old): finish the upgrade",
        ]
        [gone, new, old] = found["nodes"]
        assert gone["oldest"] > timedelta(days=365).total_seconds()
        assert (new["sessions"], new["running"], new["host"], new["pid"]) == (3, None, "h", 7)
        assert (old["version"], old["sessions"]) == (None, None)
        client.set(KEYS.lease("old"), lease.replace("}", ', "stopping": true}'), ex=60)
        result = look(empty_redis, "--wait-settled", "--timeout", "1ms", "--except", "gone")
        assert result.exit_code == 3
        assert [line for line in result.output.splitlines() if line.startswith("not settled")] == [
            "not settled: node new: it is not ready: draining",
            "not settled: node old: it is stopping",
        ]
        client.hset(KEYS.status("new"), "not_ready", "")
        assert look(empty_redis, "--wait-settled", "--except", "gone", "--except", "old").exit_code == 0
        for node in ("new", "old"):
            client.delete(KEYS.lease(node))
        none_runs = "no node has a lease: none runs, or Redis refuses their writes (imstream doctor)"
        assert shown(empty_redis)["warnings"][0] == none_runs


async def test_waiting_goes_on_while_redis_is_away(tmp_path: Path, demo: DemoBackend) -> None:
    with standing_nodes(tmp_path, demo.url, "a") as nodes:
        nodes.server.kill()
        failed = await asyncio.to_thread(look, nodes.server, "--wait-settled", "--timeout", "1ms")
        assert failed.exit_code == 1
        assert "no Redis at redis://" in failed.output
        waiting = asyncio.create_task(asyncio.to_thread(look, nodes.server, "--wait-settled", "--timeout", "1m"))
        await asyncio.to_thread(nodes.server.start)
        assert (await waiting).exit_code == 0
        await becomes(nodes["a"], None)
