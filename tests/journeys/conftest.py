"""The Redis that journeys run on: one server, Sentinel and Cluster; and the node of a module's own, `standing`."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.one_node import OneNode
from tests.support.redis_sets import Topology, cluster_set, flush, sentinel_set
from tests.support.stage import fresh_redis

TOPOLOGIES: dict[str, Callable[[Path], AbstractContextManager[Topology]]] = {
    "server": fresh_redis,
    "sentinel": sentinel_set,
    "cluster": cluster_set,
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
