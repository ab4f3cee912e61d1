"""Redis denies a node its login or a permission: the node logs it once, waits, and continues when it is fixed."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from imstream.client import Client
from tests.support.many_nodes import becomes
from tests.support.one_node import QUICK, OneNode
from tests.support.peer import peer
from tests.support.processes import PYTHON, start
from tests.support.servers import USER, DemoBackend, RedisServer
from tests.support.stage import fresh_redis
from tests.support.waiting import wait_until

DENIED = "redis denies access, see the log"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with fresh_redis(tmp_path_factory.mktemp("denying")) as made:
        yield made


@pytest.fixture
def node(server: RedisServer, demo: DemoBackend, tmp_path: Path) -> Iterator[OneNode]:
    """A node to be started, with its own password, which Redis does not have yet."""
    with server.client() as client:
        url = server.url.replace(USER, "imstream:new-secret")
        made = OneNode(tmp_path, client, url, demo.url, {**QUICK, "log_level": "debug"})
        made.start_now(wait=False)
        with made.now.process:
            yield made
        allow(client, "<new-secret")
        client.flushall()
    made.check_log()
    assert "new-secret" not in made.now.process.output()


def allow(client: redis.Redis, *rules: str) -> None:
    """Change the permissions or the password of the node's Redis user."""
    client.execute_command("ACL", "SETUSER", "imstream", *rules)  # type: ignore[no-untyped-call] # redis-py's gap


def denials(node: OneNode) -> list[str]:
    """Return the denied commands in the log of the node."""
    lines = [
        json.loads(line)
        for line in node.now.process.output().splitlines()
        if line.startswith("{") and line.endswith("}")
    ]
    return [line["error"] for line in lines if line["event"] == "redis denies access"]


async def test_a_wrong_password_is_said_once_and_a_node_begins_when_it_is_right(node: OneNode) -> None:
    await becomes(node, DENIED)
    await wait_until(lambda: len(denials(node)) > 0, "it says so")
    before = attempts(node.redis)
    # Worker, lease and inbox have each retried several times.
    await wait_until(lambda: attempts(node.redis) >= before + 5, "it tries again")
    [said] = denials(node)
    assert "IMSTREAM_REDIS_URL" in said
    allow(node.redis, ">new-secret")
    await becomes(node, None)
    async with Client(f"ws://127.0.0.1:{node.port}/ws", 10001) as client, asyncio.timeout(30):
        assert await (await client.send("why?")).text()


def attempts(client: redis.Redis) -> int:
    """Return how many logins were denied so far."""
    log: Any = client.acl_log()
    return sum(entry["count"] for entry in log if entry["reason"] == "auth")


async def test_a_permission_taken_away_is_said_clients_are_told_and_nothing_is_lost(node: OneNode) -> None:
    allow(node.redis, ">new-secret")
    await becomes(node, None)
    async with peer(node.now.ws(10001), user=10001) as someone:
        allow(node.redis, "-xadd")
        refused = await someone.chat(10001, "why?", "m")
        assert (refused["code"], refused["contents"] != "") == ("UNAVAILABLE", True)
        await wait_until(lambda: len(denials(node)) > 0, "it says so")
        assert "ops/redis-users.acl" in denials(node)[0]
        allow(node.redis, "+xadd")
        assert (await someone.chat(10001, "why?", "m"))["event"] == "accepted"
        await someone.end_of("m")
    await node.all_finished()


async def test_without_the_permission_to_read_its_stream_a_node_is_not_ready_and_says_why(node: OneNode) -> None:
    allow(node.redis, ">new-secret", "-xreadgroup")
    await becomes(node, DENIED)
    await wait_until(lambda: any("xreadgroup" in said for said in denials(node)), "it says so")
    assert len(denials(node)) == len(set(denials(node)))
    allow(node.redis, "+xreadgroup")
    await becomes(node, None)


async def test_a_node_that_starts_without_redis_says_that_it_waits_for_it(demo: DemoBackend, tmp_path: Path) -> None:
    with fresh_redis(tmp_path) as own:
        own.kill()
        with own.client() as client:
            node = OneNode(tmp_path, client, own.url, demo.url, dict(QUICK))
            node.start_now(wait=False)
            with node.now.process:
                await becomes(node, "redis does not answer")
                await wait_until(lambda: "redis not reached" in node.now.process.output(), "it says so")
                own.start()
                await becomes(node, None)
            assert node.now.process.output().count("redis not reached") == 1


@pytest.mark.parametrize("asking", ["streams", "user show 10001"])
async def test_a_command_says_what_is_denied(asking: str, server: RedisServer, tmp_path: Path) -> None:
    env = {"IMSTREAM_REDIS_URL": server.url.replace(USER, "imstream:new-secret")}
    with start([PYTHON, "-m", "imstream", *asking.split()], tmp_path / "log", env=env) as command:
        assert await asyncio.to_thread(command.wait) == 1
    assert f"the Redis at redis://127.0.0.1:{server.port}/0 denies access: " in command.output()
    assert "new-secret" not in command.output()


async def test_a_master_that_lacks_replicas_is_named_as_the_cause_and_a_node_goes_on_when_it_has_them(
    node: OneNode,
) -> None:
    allow(node.redis, ">new-secret")
    await becomes(node, None)
    node.redis.config_set("min-replicas-to-write", 1)
    await becomes(node, "redis answers NOREPLICAS, see the log")
    node.redis.config_set("min-replicas-to-write", 0)
    await becomes(node, None)
