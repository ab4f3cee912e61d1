"""`imstream drain`: SIGTERM through Redis, and its output."""

import asyncio
import json

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from imstream.keys import Keys
from tests.support.documents import redis_cli
from tests.support.many_nodes import ManyNodes
from tests.support.redis_sets import Topology
from tests.support.talk import question, whole

KEYS = Keys()
USER = 10001
TOLD = "an operator has this node drain"


def drain(on: Topology, *options: str) -> Result:
    return CliRunner().invoke(main, ["drain", "--redis", on.url, *options])


@pytest.fixture
def nodes(pair: ManyNodes) -> ManyNodes:
    return pair


async def test_running_answers_end_and_then_the_process(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, question(150), "m")
        await someone.some_text("m")
        begun = await asyncio.to_thread(drain, nodes.server, "--node", "a", "--json")
        assert begun.exit_code == 0, begun.output
        assert json.loads(begun.stdout)["missing"] == []
        assert (await someone.end_of("m")).text == whole(question(150))
        assert await someone.closed() == 1012
    assert await nodes["a"].died() == 0
    again = await asyncio.to_thread(drain, nodes.server, "--node", "a")
    assert (again.exit_code, again.output) == (1, "Error: node a does not run: see imstream nodes\n")
    assert nodes["a"].now.process.log.read_text("utf-8").count(TOLD) == 1


async def test_waiting_ends_with_the_process_and_shows_the_rest_of_its_stream(nodes: ManyNodes) -> None:
    result = await asyncio.to_thread(drain, nodes.server, "--node", "b", "--wait")
    assert result.exit_code == 0, result.output
    assert result.stdout == "node b has ended; 0 requests of its stream are unfinished\n"
    assert await nodes["b"].died() == 0


async def test_redis_cli_does_the_same_and_a_later_process_is_not_meant(nodes: ManyNodes) -> None:
    before = nodes["a"].now.process.log.read_text("utf-8").count(TOLD)
    told = redis_cli("Drain", nodes.server, {"node:0": "node:a"})  # the instance of the example is another
    instance = json.loads(told["GET im:{node:0}:lease"])["instance"]
    redis_cli("Drain", nodes.server, {"node:0": "node:a", "0a1b2c3d4e5f6789": instance})  # notices come in order
    assert await nodes["a"].died() == 0
    assert nodes["a"].now.process.log.read_text("utf-8").count(TOLD) == before + 1


def test_a_node_that_does_not_react_is_reported(empty_redis: Topology) -> None:
    assert "node a does not run" in drain(empty_redis, "--node", "a").output
    with empty_redis.client() as client:
        client.zadd(KEYS.nodes(), {"a": 1})
        lease = {"instance": "i", "host": "h", "machine": "", "pid": 7, "address": "http://h:1"}
        client.set(KEYS.lease("a"), json.dumps(lease), ex=60)
        result = drain(empty_redis, "--node", "a", "--wait", "--timeout", "1ms")
        assert (result.exit_code, result.stderr) == (3, "not confirmed: node a: it has not begun to drain\n")
        client.set(KEYS.lease("a"), json.dumps(lease | {"stopping": True}), ex=60)
        result = drain(empty_redis, "--node", "a", "--wait", "--timeout", "1ms")
        assert result.stdout == "node a is stopping; 0 requests of its stream are unfinished\n"
        assert result.exit_code == 3
        [*_, (_, notice)] = client.xrange(KEYS.inbox("a"))
        assert notice == {"event": "drain", "instance": "i"}
