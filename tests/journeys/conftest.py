"""The Redis that journeys run on: one server, Sentinel and Cluster; nodes that stand for a module; a browser."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.journeys.page_steps import PAGE_USER
from tests.journeys.page_support import Page, open_page, running_chromium
from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.one_node import OneNode
from tests.support.peer import peer
from tests.support.processes import free_port
from tests.support.redis_sets import Topology, cluster_set, flush, sentinel_set
from tests.support.servers import DemoBackend, NodeProcess, RedisServer, start_node, valkey_binary
from tests.support.stage import fresh_redis
from tests.support.users import user_id

# Nothing fails here: no fail-over is to begin because the machine is busy.
TOPOLOGIES: dict[str, Callable[[Path], AbstractContextManager[Topology]]] = {
    "server": fresh_redis,
    "sentinel": lambda folder: sentinel_set(folder, down_after=20_000),
    "cluster": lambda folder: cluster_set(folder, "--cluster-node-timeout", "20000"),
}


@pytest.fixture(scope="session", params=TOPOLOGIES)
def any_redis(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    """Each kind of Redis in turn, started once."""
    with TOPOLOGIES[request.param](tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest.fixture(scope="module")
def empty_redis(any_redis: Topology) -> Topology:
    """The same without any key."""
    flush(any_redis)
    return any_redis


@pytest.fixture
async def node(standing: OneNode) -> AsyncIterator[OneNode]:
    """The node that stands for the whole module; after each test it is idle again."""
    yield standing
    await standing.settled()
    standing.check_log()


@pytest.fixture(scope="module")
def standing_pair(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes, `a` and `b`, for the whole module."""
    with standing_nodes(tmp_path_factory.mktemp("pair"), demo.url, "a", "b") as nodes:
        yield nodes


@pytest.fixture
async def pair(standing_pair: ManyNodes) -> AsyncIterator[ManyNodes]:
    """The same, both running; after each test they are idle again."""
    await standing_pair.mended()
    yield standing_pair
    await standing_pair.settled()


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    """The address of a browser."""
    with running_chromium() as address:
        yield address


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for the whole module."""
    server = RedisServer(valkey_binary(), free_port(), tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def standing_page_node(
    valkey: RedisServer, demo: DemoBackend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """A node in its own process, whose page the tests of a module use."""
    started = start_node(tmp_path_factory.mktemp("node"), redis_url=valkey.url, ai_url=demo.url)
    with started.process:
        yield started


@pytest.fixture
async def page_node(standing_page_node: NodeProcess) -> AsyncIterator[NodeProcess]:
    """The same. At the end, no answer is left that the page of the next test, whose user is the same, would show."""
    yield standing_page_node
    user = user_id(PAGE_USER)
    async with peer(standing_page_node.ws(user)) as someone:
        await someone.send_frame("INIT", userId=user, wants=["asked"])
        for message in (await someone.until(msgType="INIT"))["messages"]:
            if message["state"] not in {"done", "failed", "cancelled"}:
                await someone.send_frame("CANCEL", messageId=message["messageId"])
                await someone.end_of(message["messageId"])


@pytest.fixture
async def page(chromium: str) -> AsyncIterator[Page]:
    """A tab with English as its language. At the end, the browser must have reported no error."""
    async with open_page(chromium) as opened:
        yield opened
        assert opened.complaints == []
