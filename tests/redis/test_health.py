"""Warnings about unsafe settings of Redis, on one server, Sentinel and Cluster."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from imstream.redis import health
from imstream.redis.client import RedisClient
from tests.support.processes import free_port
from tests.support.redis_sets import ClusterSet, cluster_set, sentinel_set
from tests.support.servers import RedisServer

MAY_LOSE = "when it fails over (min-replicas-to-write 0); use two replicas and set min-replicas-to-write 1"
STOPS = "accepts no messages (NOREPLICAS) when it lacks a replica, as after a fail-over, and has 1; use two replicas"
FORGETS = "when it restarts (appendonly no); set appendonly yes"
EVICTS = "set maxmemory-policy noeviction"


async def _warnings(url: str) -> list[str]:
    async with RedisClient(url, connections=1, timeout=timedelta(seconds=2)) as redis_client:
        return await health.warnings(redis_client)


async def test_a_server_that_keeps_all_is_not_warned_about(own_server: RedisServer) -> None:
    with own_server.client() as client:
        client.config_set("maxmemory-policy", "volatile-lru")  # without a maxmemory
        client.config_set("min-replicas-to-write", 0)
    assert await _warnings(own_server.url) == []


async def test_a_server_that_evicts_or_forgets_is_warned_about(own_server: RedisServer) -> None:
    with own_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
    evicts, forgets = await _warnings(own_server.url)
    assert evicts.endswith(EVICTS)
    assert forgets.endswith(FORGETS)


async def test_a_server_that_is_not_there_cannot_be_looked_at() -> None:
    [warning] = await _warnings(f"redis://127.0.0.1:{free_port()}")
    assert warning.startswith("cannot read the settings of Redis: ")


async def test_a_master_that_needs_no_replica_to_write_is_warned_about(tmp_path: Path) -> None:
    with sentinel_set(tmp_path) as sentinels:
        for url in (sentinels.url, sentinels.master.url):  # without Sentinel, too: it has a replica
            [warning] = await _warnings(url)
            assert warning.endswith(MAY_LOSE)
        with sentinels.client() as client:
            client.config_set("min-replicas-to-write", 1)
        [warning] = await _warnings(sentinels.url)
        assert STOPS in warning


async def test_a_master_with_two_replicas_is_not_warned_about_if_it_needs_one(tmp_path: Path) -> None:
    with sentinel_set(tmp_path, replicas=2) as sentinels, sentinels.client() as client:
        [warning] = await _warnings(sentinels.url)
        assert warning.endswith("when it fails over (min-replicas-to-write 0); set min-replicas-to-write 1")
        client.config_set("min-replicas-to-write", 1)
        assert await _warnings(sentinels.url) == []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSet]:
    """A cluster with default settings."""
    with cluster_set(tmp_path_factory.mktemp("health")) as made:
        yield made


async def test_every_master_of_a_cluster_is_looked_at(cluster: ClusterSet) -> None:
    [warning] = await _warnings(cluster.url)
    assert warning.endswith(MAY_LOSE)  # all masters alike: no addresses
    settings = (("min-replicas-to-write", 1), ("appendonly", "no"), ("maxmemory-policy", "allkeys-lfu"))
    for server, (name, value) in zip(cluster.masters, settings, strict=True):
        with server.client() as client:
            client.config_set(name, value)
    names = [f"127.0.0.1:{server.port}" for server in cluster.masters]
    said = dict(warning.removesuffix(")").rsplit(" (on ", 1) for warning in await _warnings(cluster.url))
    assert {sentence.rpartition("; ")[2]: set(on.split(", ")) for sentence, on in said.items()} == {
        "use two replicas and set min-replicas-to-write 1": set(names[1:]),
        "use two replicas, or set min-replicas-to-write 0": {names[0]},
        FORGETS.rpartition("; ")[2]: {names[1]},
        EVICTS: {names[2]},
    }
