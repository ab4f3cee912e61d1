"""Several real servers as one Redis: a master with replicas and Sentinels, and a Redis Cluster."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import redis
from redis.cluster import ClusterNode
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.sentinel import Sentinel

from tests.support.certificates import RedisTls
from tests.support.processes import Running, free_port, start, wait_for
from tests.support.servers import ADMIN, ADMIN_LOGIN, REPLICATION, USER, RedisServer, as_admin, users, valkey_binary
from tests.support.waiting import SLOW

SERVICE = "im"
"""The Sentinels' service name of the master."""

_QUICK_REPLICATION = (*REPLICATION, "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
# A Sentinel that has not heard of a fail-over within 4 publish periods turns the new master back into a replica.
_QUICK_SENTINEL = ("info-period", 200, "publish-period", 700, "ask-period", 100)


def until(condition: Callable[[], object], description: str, limit: float = 20.0 * SLOW) -> None:
    """Wait until a condition holds, for set-up code; errors of Redis count as not yet. Tests use `wait_until`."""
    deadline = time.monotonic() + limit
    while not _holds(condition):
        assert time.monotonic() < deadline, f"not within {limit} s: {description}"
        time.sleep(0.02)


def _holds(condition: Callable[[], object]) -> bool:
    try:
        return bool(condition())
    except redis.RedisError:
        return False


@dataclass
class SentinelSet:
    """One master, its replicas, and three Sentinels that promote a replica when it dies.

    Attributes:
        servers: All servers; the master changes.
        down_after: Milliseconds of silence after which a server counts as down. A busy machine is silent for a second.
    """

    folder: Path
    servers: list[RedisServer]
    sentinel_ports: list[int]
    sentinels: list[Running]
    tls: RedisTls | None = None
    down_after: int = 500

    def _sentinel(self, port: int | None = None) -> redis.Redis:
        """A client of a Sentinel, by default of the first one."""
        return redis.Redis(port=port or self.sentinel_ports[0], decode_responses=True, **as_admin(self.tls))

    @property
    def url(self) -> str:
        """Its URL."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        own = {"sentinel_username": "imstream", "sentinel_password": "imstream-secret"}
        query = urlencode(own | (self.tls.query if self.tls else {}))
        return f"{'rediss' if self.tls else 'redis'}+sentinel://{USER}@{hosts}/{SERVICE}/0?{query}"

    @property
    def admin_url(self) -> str:
        """Its URL with unrestricted permissions, for tests."""
        return self.url.replace(USER, ADMIN_LOGIN)

    @property
    def master(self) -> RedisServer:
        """The current master according to the Sentinels."""
        with self._sentinel() as sentinel:
            _, port = sentinel.sentinel_get_master_addr_by_name(SERVICE)
        return next(server for server in self.servers if server.port == int(port))

    @property
    def replica(self) -> RedisServer:
        """The first server that is not the master."""
        return next(server for server in self.servers if server is not self.master)

    def fail_over(self) -> None:
        """Fail over to another server in an orderly way, and wait for it.

        On a busy machine, the Sentinels give it up: it takes longer than `failover-timeout`, or the replica seems down.
        """
        before = self.master
        with self._sentinel() as sentinel:
            sentinel.execute_command("SENTINEL SET", SERVICE, "failover-timeout", 20_000)

            def has_failed_over() -> bool:
                state: Any = sentinel.sentinel_master(SERVICE)
                if state["port"] != before.port:
                    return True
                if "failover_in_progress" not in state["flags"]:
                    sentinel.execute_command("SENTINEL FAILOVER", SERVICE)
                return False

            until(has_failed_over, "another server is the master")

    def client(self) -> redis.Redis:
        """A client that looks up the master for each connection."""
        addresses = [("127.0.0.1", port) for port in self.sentinel_ports]
        sentinels = Sentinel(addresses, sentinel_kwargs=as_admin(self.tls))  # type: ignore[no-untyped-call] # redis-py's gap
        client: redis.Redis = sentinels.master_for(  # type: ignore[no-untyped-call] # same
            SERVICE, decode_responses=True, socket_timeout=5, **as_admin(self.tls)
        )
        return client

    def start(self) -> None:
        """Start all servers, and wait until every Sentinel has found all others."""
        for server in self.servers:
            server.start()
        for replica in self.servers[1:]:
            with replica.client() as client:
                until(lambda: _is_in_step(client), "the replicas follow the master")
        for port in self.sentinel_ports:
            self.sentinels.append(self._start_sentinel(port))
        for port in self.sentinel_ports:
            with self._sentinel(port) as sentinel:
                until(lambda: self._knows_all(sentinel), "the Sentinels know each other")

    def stop(self) -> None:
        """Stop all servers."""
        for sentinel in self.sentinels:
            sentinel.__exit__(None, None, None)
        for server in self.servers:
            server.stop()

    def _start_sentinel(self, port: int) -> Running:
        folder = self.folder / f"sentinel-{port}"
        folder.mkdir()
        config = folder / "sentinel.conf"
        listens = self.tls.options(port) if self.tls else {"port": str(port)}
        config.write_text(
            "".join(f"{name} {value}\n" for name, value in listens.items()) + f"bind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.servers[0].port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {self.down_after}\n"
            f"sentinel failover-timeout {SERVICE} 1500\n"
            f"sentinel auth-user {SERVICE} sentinel\nsentinel auth-pass {SERVICE} sentinel-secret\n"
            f"sentinel sentinel-user sentinel\nsentinel sentinel-pass sentinel-secret\n{users('sentinel-users.acl')}"
        )
        process = start([self.servers[0].binary, str(config), "--sentinel"], folder / "log")
        with self._sentinel(port) as client:
            wait_for(lambda: _holds(client.ping), process, "sentinel")
            client.execute_command("SENTINEL", "DEBUG", *_QUICK_SENTINEL)
        return process

    def _knows_all(self, sentinel: redis.Redis) -> bool:
        state: Any = sentinel.sentinel_master(SERVICE)
        others = len(self.sentinel_ports) - 1
        replicas: Any = sentinel.sentinel_slaves(SERVICE)
        usable = [one for one in replicas if one["master-link-status"] == "ok" and not one["is_sdown"]]
        return bool(state["num-other-sentinels"] == others and len(usable) == len(self.servers) - 1)


@dataclass
class ClusterSet:
    """A Redis Cluster of three masters with a replica each."""

    masters: list[RedisServer]
    replicas: list[RedisServer]
    tls: RedisTls | None = None

    @property
    def url(self) -> str:
        """Its URL with two of its nodes."""
        hosts = ",".join(f"127.0.0.1:{master.port}" for master in self.masters[:2])
        tls = f"?{urlencode(self.tls.query)}" if self.tls else ""
        return f"{'rediss' if self.tls else 'redis'}+cluster://{USER}@{hosts}{tls}"

    @property
    def admin_url(self) -> str:
        """Its URL with unrestricted permissions, for tests."""
        return self.url.replace(USER, ADMIN_LOGIN)

    @property
    def all(self) -> list[RedisServer]:
        """Every server."""
        return [*self.masters, *self.replicas]

    def client(self) -> redis.Redis:
        """A client for the test, typed as an ordinary one."""
        return cast("redis.Redis", self._client())

    def _client(self) -> redis.RedisCluster:
        nodes = [ClusterNode("127.0.0.1", server.port) for server in self.all]  # type: ignore[no-untyped-call] # redis-py's gap
        return redis.RedisCluster(
            startup_nodes=nodes,
            decode_responses=True,
            socket_timeout=5,
            require_full_coverage=False,
            **as_admin(self.tls),
        )

    def master_of(self, key: str) -> RedisServer:
        """The server that owns the slot of a key."""
        with self._client() as client:
            node: Any = client.get_node_from_key(key)
        return next(server for server in self.all if server.port == node.port)

    def other_than(self, server: RedisServer) -> RedisServer:
        """Another master."""
        return next(one for one in self.masters if one is not server)

    def start(self) -> None:
        """Start all servers, assign the slots, and wait until every node agrees."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(RedisServer.start, self.all))
        each = -(-REDIS_CLUSTER_HASH_SLOTS // len(self.masters))
        for number, server in enumerate(self.all):
            with server.client() as node:
                until(partial(_has_epoch, node, number + 1), "every node has its number")
        for number, server in enumerate(self.all):
            with server.client() as node:
                node.execute_command("CLUSTER MEET", "127.0.0.1", self.masters[0].port, _bus(self.masters[0]))
                if server in self.masters:
                    last = min((number + 1) * each, REDIS_CLUSTER_HASH_SLOTS) - 1
                    node.execute_command("CLUSTER ADDSLOTSRANGE", number * each, last)
        self.each_node(lambda node: _cluster_info(node)["cluster_known_nodes"] == str(len(self.all)), "they have met")
        for master, replica in zip(self.masters, self.replicas, strict=True):
            with replica.client() as node:
                node.execute_command("CLUSTER REPLICATE", node_id(master))
        self.each_node(_is_in_step, "the replicas follow their masters")
        self.each_node(lambda node: _cluster_info(node)["cluster_state"] == "ok", "all slots are served")

    def each_node(self, condition: Callable[[redis.Redis], object], description: str) -> None:
        """Wait until a condition holds for every living node."""
        for server in self.all:
            if server.process is not None and server.process.process.poll() is None:
                with server.client() as node:
                    until(lambda: condition(node), description)

    def stop(self) -> None:
        """Stop all servers."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(RedisServer.stop, self.all))

    def begin_move(self, key: str, target: RedisServer) -> RedisServer:
        """Begin to migrate the slot of a key: new keys go to the target. Return the source."""
        slot, source = key_slot(key.encode()), self.master_of(key)
        _setslot(target, slot, "IMPORTING", node_id(source))
        _setslot(source, slot, "MIGRATING", node_id(target))
        return source

    def move_keys(self, key: str, source: RedisServer, target: RedisServer, *, most: int = 1000) -> None:
        """Migrate keys of the slot."""
        slot = key_slot(key.encode())
        with source.client() as node:
            keys = node.execute_command("CLUSTER GETKEYSINSLOT", slot, most)
            if keys:
                migrate = ("MIGRATE", "127.0.0.1", target.port, "", 0, 5000)
                node.execute_command(*migrate, "AUTH2", *ADMIN.values(), "KEYS", *keys)

    def end_move(self, key: str, target: RedisServer) -> None:
        """Assign the slot to the target."""
        slot = key_slot(key.encode())
        for server in (target, *(one for one in self.masters if one is not target)):
            _setslot(server, slot, "NODE", node_id(target))

    def move(self, key: str, target: RedisServer) -> None:
        """Migrate the slot of a key with all its keys."""
        source = self.begin_move(key, target)
        self.move_keys(key, source, target)
        self.end_move(key, target)


Topology = RedisServer | SentinelSet | ClusterSet
"""A Redis of any topology."""


def flush(redis_: Topology) -> None:
    """Delete all keys."""
    masters = redis_.masters if isinstance(redis_, ClusterSet) else [redis_]
    for master in masters:
        with master.client() as client:
            client.flushall()


def _setslot(server: RedisServer, slot: int, *words: str) -> None:
    with server.client() as node:
        node.execute_command("CLUSTER SETSLOT", slot, *words)


def node_id(server: RedisServer) -> str:
    """The id of a cluster node."""
    with server.client() as node:
        return str(node.execute_command("CLUSTER MYID"))


def _cluster_info(node: redis.Redis) -> dict[str, str]:
    info: Any = node.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call] # redis-py's gap
    return info if isinstance(info, dict) else dict(line.split(":", 1) for line in str(info).split())


def _has_epoch(node: redis.Redis, epoch: int) -> bool:
    """Assign a slot once: a client that times out repeats the command, and the repetition is an error."""
    if _cluster_info(node)["cluster_my_epoch"] == "0":
        node.execute_command("CLUSTER SET-CONFIG-EPOCH", epoch)  # type: ignore[no-untyped-call] # redis-py's gap
    return _cluster_info(node)["cluster_my_epoch"] == str(epoch)


def _is_in_step(node: redis.Redis) -> bool:
    info: Any = node.info("replication")
    return bool(info["connected_slaves"] == 1 if info["role"] == "master" else info["master_link_status"] == "up")


def _bus(server: RedisServer) -> str:
    return server.options[server.options.index("--cluster-port") + 1]


@contextmanager
def sentinel_set(
    folder: Path,
    *options: str,
    replicas: int = 1,
    binary: str | None = None,
    tls: RedisTls | None = None,
    down_after: int = 500,
) -> Iterator[SentinelSet]:
    """Start a master with Sentinels. `options` are those of the servers. `down_after`: see `SentinelSet`."""
    binary, quick = binary or valkey_binary(), (*_QUICK_REPLICATION, *options)
    servers = [RedisServer(binary, free_port(), folder / "master", quick, tls=tls)]
    for number in range(replicas):
        follow = (*quick, "--replicaof", f"127.0.0.1 {servers[0].port}")
        servers.append(RedisServer(binary, free_port(), folder / f"replica-{number}", follow, tls=tls))
    made = SentinelSet(folder, servers, [free_port() for _ in range(3)], [], tls, down_after)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@contextmanager
def cluster_set(
    folder: Path, *options: str, binary: str | None = None, tls: RedisTls | None = None
) -> Iterator[ClusterSet]:
    """Start a cluster. `options` are those of the servers; `binary` is Redis or Valkey from 7.0 on."""
    nodes = [_cluster_node(binary or valkey_binary(), folder / f"{number}", options, tls) for number in range(6)]
    made = ClusterSet(nodes[:3], nodes[3:], tls)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _cluster_node(binary: str, folder: Path, options: tuple[str, ...], tls: RedisTls | None) -> RedisServer:
    cluster = (
        *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-port", str(free_port())),
        *("--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0"),
        # The death of a master must not affect the keys of the others.
        *("--cluster-require-full-coverage", "no", "--cluster-allow-replica-migration", "no"),
    )
    return RedisServer(binary, free_port(), folder, (*_QUICK_REPLICATION, *cluster, *options), tls=tls)
